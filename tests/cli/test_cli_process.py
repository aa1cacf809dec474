"""The command line as a shell sees it: exit status, stdout, one line on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import run_llama1b
from tests.support import BUNDLED, ROOT

SCRIPT = ROOT / "run_llama1b.py"
# main() with a fake engine of many slow tokens, in a process of its own.
FAKE = (
    "import sys; sys.path.insert(0, {root!r})\n"
    "from tests.support.cli_fakes import FakeEngine, Loader, ids_of\n"
    "import run_llama1b\n"
    "sys.exit(run_llama1b.main(sys.argv[1:], Loader(FakeEngine(ids_of('word 日本 ') * 60, pause={pause}))))\n"
)


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"} | extra


def refused(*argv: str | bytes) -> str:
    """Runs the program and returns its one line of complaint."""
    done = subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, env=environment(), timeout=120, cwd=ROOT)
    error = done.stderr.decode()
    assert done.returncode == 2, error
    assert done.stdout == b""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max-tokens", "-1"], "--max-tokens"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--max-tokens", "1.5"], "--max-tokens"),
        (["--max-tokens", ""], "--max-tokens"),
        (["--max-tokens"], "--max-tokens"),
        (["--temperature", "-0.1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--temperature", "3.5e38"], "temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-k", "-1"], "top_k"),
        (["--top-k", "2.0"], "--top-k"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "1.01"], "top_p"),
        (["--top-p", "nan"], "top_p"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**63)], "seed"),
        (["--sms", "0"], "--sms"),
        (["--sms", "201"], "--sms"),
        (["--sms", "all"], "--sms"),
        (["--backend", "tpu"], "--backend"),
        (["--prompt", ""], "--prompt"),
        (["--model", ""], "--model"),
        (["--no-such-option"], "--no-such-option"),
        (["--max-tok", "3"], "--max-tok"),  # no abbreviations: a later option must not change what one means
        (["--prompt", "a", "stray"], "stray"),
        (["two\nlines"], "two lines"),
    ],
)
def test_bad_arguments(argv: list[str], named: str) -> None:
    assert named in refused(*argv)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--model", str(SCRIPT)], "run_llama1b.py"),
        (["--model", "random:llama-9"], "llama-9"),
        (["--model", "owner/no-such-model"], "owner/no-such-model"),
        (["--model", "random:llama-3.2-1b", "--chat"], "--chat"),
        (["--prompt", b"\xff\xfe"], "UTF-8"),
    ],
)
def test_bad_models_and_prompts(argv: list[str | bytes], named: str) -> None:
    assert named in refused(*argv)


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def holding(name: str, content: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).write_text(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("config.json"), "config.json"),
        (without("model.safetensors"), "safetensors"),
        (without("tokenizer.json"), "tokenizer.json"),
        (holding("tokenizer.json", "{}"), "tokenizer.json"),
        (holding("tokenizer.json", "not\nJSON"), "tokenizer.json"),
        (without("tokenizer_config.json"), "chat template"),
        (holding("tokenizer_config.json", "{"), "tokenizer_config.json"),
        (holding("tokenizer_config.json", "[]"), "tokenizer_config.json"),
        (holding("tokenizer_config.json", '{"chat_template": "{% if %}"}'), "tokenizer_config.json"),
        (holding("tokenizer_config.json", '{"chat_template": "{{ raise_exception(\'no\\nway\') }}"}'), "no way"),
        (holding("tokenizer_config.json", '{"chat_template": ""}'), "prompt is empty"),
    ],
)
def test_damaged_model_directories(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    for file in BUNDLED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    damage(tmp_path)
    assert named in refused("--model", str(tmp_path), "--chat", "--prompt", "a")


def fake_process(*argv: str, pause: float = 0.02, **extra: str) -> subprocess.Popen[bytes]:
    program = FAKE.format(root=str(ROOT), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", program, "--prompt", "a", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**extra),
        cwd=ROOT,
    )


def test_ctrl_c_ends_a_stream_with_status_130() -> None:
    with fake_process() as process:
        assert process.stdout is not None
        begun = process.stdout.read(4)  # the text streams: it is here long before the process ends
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    text = (begun + out).decode()  # whole characters only, or this fails
    assert text.startswith("word")
    assert ("word 日本 " * 60).startswith(text.rstrip("\n"))
    assert b"Traceback" not in err
    assert b"(interrupted)" in err


def test_ctrl_c_prints_the_json_object() -> None:
    with fake_process("--json") as process:
        assert process.stderr is not None
        process.stderr.readline()  # loaded: generation has begun
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["finish_reason"] == "interrupted"


def test_a_reader_who_leaves_ends_the_run_without_complaint() -> None:
    with fake_process() as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(4)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 141
    assert b"Traceback" not in err
    assert b"Broken" not in err


def test_a_full_disk_is_named() -> None:
    program = FAKE.format(root=str(ROOT), pause=0)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "--prompt", "a", "--json"],
            stdout=full, stderr=subprocess.PIPE, env=environment(), cwd=ROOT, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("error: stdout cannot be written: ")


def test_a_terminal_that_cannot_show_a_character_is_no_reason_to_fail() -> None:
    with fake_process("--max-tokens", "12", pause=0, PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith(b"word \\u65e5")


def test_help_names_every_option_and_its_default() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for option in fields(run_llama1b.Options):
        if option.name != "sampling":
            assert f"--{option.name.replace('_', '-')}" in done.stdout
    for drawn in ("--temperature", "--top-k", "--top-p", "--seed"):
        assert drawn in done.stdout
    assert "default: 128" in done.stdout


def test_arguments_are_refused_before_torch_is_imported() -> None:
    program = "import sys, run_llama1b; run_llama1b.main(['--sms', '0']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60).returncode == 0
