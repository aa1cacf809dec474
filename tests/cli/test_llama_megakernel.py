"""`llama-megakernel`: one command with subcommands, and without one what it always was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llama_megakernel
from llama_megakernel import BENCH, COMMANDS, benchmarks, chosen, main, overview
from models.errors import UserError
from tests.support import ROOT

COMMAND = [sys.executable, str(ROOT / "llama_megakernel.py")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a"], ["--json"], ["-h", "--json"]])
def test_options_alone_are_those_of_run(arguments: list[str]) -> None:
    assert chosen(arguments) == ("run", "run_llama1b", arguments)


def test_a_command_takes_what_follows() -> None:
    assert chosen(["serve", "--port", "1"]) == ("serve", "serving.command", ["--port", "1"])
    assert chosen([BENCH, "vm", "--tokens", "1"]) == ("bench vm", "bench.vm", ["--tokens", "1"])
    assert chosen([BENCH, "compare", "--help"])[1] == "bench.compare.__main__"


def completed(line: str, folder: Path) -> set[str]:
    """What a shell is told that may stand at the end of a line."""
    said = folder / "said"
    asks = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(said), "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | asks)
    assert done.stdout == "", "nothing is done"
    return {word.strip() for word in said.read_text().split("\v")} if said.exists() else set()


def test_a_shell_is_told_what_may_follow(tmp_path: Path) -> None:
    cases = {
        "llama-megakernel ": {*COMMANDS, BENCH},
        "llama-megakernel se": {"serve"},
        "llama-megakernel serve --answer": {"--answer-seconds", "--answer-tokens"},
        "llama-megakernel chat --backend v": {"vm"},
        "llama-megakernel --max": {"--max-tokens"},
        "llama-megakernel bench ve": set(),
        "llama-megakernel bench se": {"serve"},
        "llama-megakernel bench vm --tok": {"--tokens"},
    }
    for number, (line, expected) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = completed(line, folder)
        assert found - {"-h", "--help", ""} == expected, line


@pytest.mark.parametrize("arguments", [["sevre"], [BENCH], [BENCH, "nothing"]])
def test_what_is_no_command_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        chosen(arguments)
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_overview_names_all_and_fits_a_screen() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stdout == overview() + "\n"
    assert all(name in done.stdout for name in (*COMMANDS, *benchmarks()))
    assert "serve" in benchmarks() and "record" not in benchmarks()


def test_each_command_calls_itself_by_this_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.command._called", "")
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"usage: llama-megakernel {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "chat", "serve"])
def test_options_of_one_name_say_one_thing(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.command._called", "")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "--backend {auto,gpu,torch,vm} auto, the default, takes the kernel (gpu) where it runs, else torch",
        "--context N tokens that prompt and answer may have together",
        "--temperature T 0 takes the likeliest token (default: the model's own)",
        "(default: SmolLM2-135M-Instruct, fetched once)",
    ):
        assert words in shown


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    monkeypatch.setattr("models.command._called", "")
    monkeypatch.setattr(llama_megakernel, "import_module", missing)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "error: serve needs uvicorn: pip install 'llama-megakernel[serve]'\n"


def test_bad_options_of_the_server_are_refused_before_torch_is_imported() -> None:
    program = "import sys, llama_megakernel; llama_megakernel.main(['serve', '--sms', '0']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60).returncode == 0
