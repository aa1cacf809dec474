"""What all commands have in common, as a shell sees it: one line for a mistake, streams that are closed or full, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.command import Parser, add_model, command, note, real, whole
from models.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = str(ROOT / "models" / "bundled")
RUN = [sys.executable, str(ROOT / "run_llama1b.py"), "--backend", "vm"]
COMMANDS = {
    "models.smollm2": [],
    "scheduler": ["--model", BUNDLED, "--sms", "4"],
    "scheduler.check": [],
    "scheduler.draw": ["--model", BUNDLED],
    "scheduler.timeline": ["--model", BUNDLED],
    "megakernel.compile": ["--model", BUNDLED],
    "bench.check": [],
    "bench.compare": ["--model", BUNDLED],
    "bench.decode": [],
    "bench.formats": [],
    "bench.load": [],
    "bench.schedule": [],
    "bench.serve": [],
    "chat": [],
    "serving": [],
    "scheduler.simulate": ["--model", BUNDLED],
    "bench.trace": [],
    "bench.vm": [],
    "tests.megakernel.torch.company": [],
    "tests.serving.campaign": [],
}

ALIKE = {"bench.check", "bench.formats", "bench.load", "bench.schedule", "bench.trace", "bench.vm"}  # all end in one place


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def buffered() -> dict[str, str]:
    """The environment of a user, whose Python does not write every character at once."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a line in which "$@" is a command."""
    return subprocess.run(
        ["sh", "-c", line, "sh", *arguments], capture_output=True, text=True, cwd=ROOT, env=buffered(), timeout=120
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] if name in ALIKE else []) for name in COMMANDS])
def test_every_command_refuses_in_one_line(name: str) -> None:
    done = subprocess.run(module(name, *COMMANDS[name], "--nonsense"), capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["scheduler", "scheduler.draw", "scheduler.simulate", "megakernel.compile", "bench.load"])
def test_a_model_is_asked_for_in_the_same_words(name: str) -> None:
    done = subprocess.run(module(name, "--help"), capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (
        "a directory in Hugging Face's layout, a GGUF file, random:<preset>, or, where weights are read, a hub id"
        in " ".join(done.stdout.split())
    )


@pytest.mark.parametrize("redirection", ["2>&-", "0<&-", "2>&- 0<&-"])
def test_a_closed_stream_does_not_spoil_the_others(redirection: str) -> None:
    done = shell(f'"$@" {redirection}', *RUN, "--json", "--max-tokens", "1")
    assert done.returncode == 0
    assert json.loads(done.stdout)["finish_reason"] == "length"


def test_a_closed_stdout_takes_no_file_for_itself() -> None:
    done = shell('"$@" >&-', *RUN, "--max-tokens", "1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "1 tokens (length)" in done.stderr


@pytest.mark.parametrize("arguments", [["--max-tokens", "1"], ["--max-tokens", "1", "--json"]])
def test_a_full_stderr_is_no_reason_to_fail(arguments: list[str]) -> None:
    done = shell('"$@" 2>/dev/full', *RUN, *arguments)
    assert done.returncode == 0 and done.stdout
    assert shell('"$@" 2>/dev/full', *RUN, "--sms", "0").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [*RUN, "--help"],
        module("scheduler", "--model", BUNDLED, "--sms", "2"),
        module("scheduler", "--model", BUNDLED, "--sms", "2", "--disassemble"),
    ],
)
def test_a_full_stdout_is_named(arguments: list[str]) -> None:
    done = shell('"$@" >/dev/full', *arguments)
    assert (done.returncode, done.stderr) == (2, "error: stdout cannot be written: No space left on device\n")


def test_a_reader_who_leaves_ends_any_command() -> None:
    line = '{ "$@"; echo $? >&2; } | head -n 1'
    done = shell(line, *module("scheduler", "--model", "random:llama-3.2-1b", "--sms", "8", "--disassemble"))
    assert done.stderr == "141\n" and done.stdout.count("\n") == 1


def interrupted(arguments: list[str], after: float, again: float | None = None) -> tuple[int, str]:
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        if again is not None:
            time.sleep(again)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


def begun() -> float:
    """Seconds after which Python itself has started, and runs what it was asked to, however busy this machine is."""
    before = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return 0.05 + 2 * (time.perf_counter() - before)


ENDLESS = ["--max-tokens", "1000", "--temperature", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [None, 0.0, 0.05])
def test_ctrl_c_at_any_moment_of_a_start(again: float | None) -> None:
    """Most of the first second goes to imports of torch and others, in which Ctrl-C was a traceback now and then."""
    for place in range(12):
        status, err = interrupted([*RUN, *ENDLESS], begun() + 0.1 * place, again)
        assert status == 130, err
        assert "Traceback" not in err and "Exception" not in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scheduler.timeline", "bench.load"])
def test_ctrl_c_at_any_moment_of_another_start(name: str) -> None:
    for place in range(6):
        status, err = interrupted(module(name, "--model", "random:llama-3.2-1b"), begun() + 0.2 * place)
        assert (status, err) == (130, "")


IMPORTING = (
    "import sys; sys.path[:0] = [{root!r}, {folder!r}]\n"
    "from models.command import command, start\n"
    "@command\n"
    "def main():\n"
    "    import sleepy\n"
    "    return 0\n"
    "start(main)\n"
)
SLEEPY = """\
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**6):
        pass
except BaseException as error:
    raise ImportError("numpy failed to import") from error
"""


def test_ctrl_c_in_an_import_that_takes_it_for_a_failure(tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    program = IMPORTING.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_ctrl_c_in_a_destructor_is_not_lost() -> None:
    program = (
        f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from models.command import command, start\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for _ in range(10**6): pass\n"
        "@command\n"
        "def main():\n"
        "    Late()\n"
        "    return 0\n"
        "start(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_processes_of_a_benchmark_are_silent_when_it_is_interrupted() -> None:
    """Ctrl-C in a terminal goes to all of them."""
    process = subprocess.Popen(
        module("bench.schedule", "--models", "llama-3.2-1b", "--repeats", "1000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(3.0)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (UserError("no\nway"), 2, "error: no way\n"),
        (UserError("a \x1b[31mred\x9b1m \x07file"), 2, "error: a \\x1b[31mred\\x9b1m \\x07file\n"),
        (MemoryError(), 2, "error: there is not enough memory: free some, or ask for less\n"),
        (OSError(errno.EACCES, "Permission denied", "/some/file"), 2, "error: /some/file: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: stdout cannot be written: No space left on device\n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "error: the system refused: Cannot allocate memory\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_a_command_makes_of_an_exception(
    capsys: pytest.CaptureFixture[str], raised: BaseException, status: int, line: str
) -> None:
    @command
    def main() -> int:
        raise raised

    assert main() == status
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_ours_is_not_hidden() -> None:
    @command
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_numbers_have_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="p", description="d")
    parser.add_argument("--count", type=whole(1, 10))
    parser.add_argument("--share", type=real(0.0, 1.0))
    assert parser.parse_args(["--count", "10", "--share", "0.5"]) == parser.parse_args(["--share=5e-1", "--count=10"])
    for wrong in ("0", "11", "1.0", "", "x", "9" * 5000):
        with pytest.raises(UserError, match="--count: must be a whole number from 1 to 10, got ") as caught:
            parser.parse_args(["--count", wrong])
        assert len(str(caught.value)) < 200
    for wrong in ("nan", "inf", "-0.1", "2", "", "9" * 5000):
        with pytest.raises(UserError, match="--share: must be a number from 0 to 1, got ") as caught:
            parser.parse_args(["--share", wrong])


def test_a_long_mistake_is_cut() -> None:
    parser = Parser(prog="p", description="d")
    add_model(parser)
    with pytest.raises(UserError) as caught:
        parser.parse_args(["x" * 10_000])
    assert len(str(caught.value)) < 600


def test_control_characters_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    note("loaded \x1b[2J model")
    assert capsys.readouterr().err == "loaded [2J model\n"
