"""Programs made ahead by another process: the same bits, never anything else, and a process that leaves nothing behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from instructions.shape import Shape
from models.families import PRESETS
from scheduler import ahead as module
from scheduler.ahead import Ahead, Which, digest, receive, send
from scheduler.buckets import BucketPrograms
from scheduler.errors import ScheduleError
from tests.support import ROOT
from tests.support.compile_cases import MODELS

START = """
import sys, time
from models.families import PRESETS
from scheduler.buckets import BucketPrograms
programs = BucketPrograms(PRESETS["llama-3-8b"], sms=132, capacity=20000, itemsize=2)
programs.build_ahead(range(len(programs.sizes)))
print(programs._ahead._process.pid, flush=True)
"""


def small(policy: str = "balanced") -> BucketPrograms:
    return BucketPrograms(MODELS["bundled"], sms=4, capacity=2048, itemsize=2, policy=policy)


def ahead_of(programs: BucketPrograms) -> Ahead:
    assert programs._ahead is not None
    return programs._ahead


def gone(pid: int) -> bool:
    """Whether a process has ended, within some seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":  # of an orphan, whom whoever adopts it may leave so
            return True
        time.sleep(0.05)
    return False


def test_they_are_those_that_would_be_made_here_and_the_process_ends() -> None:
    here, there = small(), small()
    places = range(len(here.sizes))
    there.build_ahead(places)
    for place in places:
        for tail in (True, False):
            assert ahead_of(there).take((place, tail)) is there.program(place, tail)
            assert digest(there.program(place, tail)) == digest(here.program(place, tail))
    ahead = ahead_of(there)
    ahead._thread.join(20)
    assert ahead._process.returncode == 0, "it has ended, and has been waited for"
    there.close()
    there.close()


def test_only_what_was_proven_is_accepted() -> None:
    programs = small()
    program = programs.program(0)
    file = io.BytesIO()
    send(file, (0, False), program)
    data = file.getvalue()

    def shape_of(which: Which) -> Shape:
        return programs.shape(programs.sizes[which[0]], which[1])

    which, found = receive(io.BytesIO(data), shape_of, 4, "balanced")
    assert (which, digest(found)) == ((0, False), digest(program))
    np.testing.assert_array_equal(found.words, program.words)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    renamed = [data.replace(b'"which": [0', b'"which": [1', 1), data.replace(b"false", b"true", 1)]
    renamed.append(data.replace(b'"ring": ', b'"ring": 1', 1))
    for bad in (bytes(changed), data[:-4], *renamed):
        assert bad != data
        with pytest.raises(ValueError, match="wrong size|reshape|not the program that was proven|buffer size"):
            receive(io.BytesIO(bad), shape_of, 4, "balanced")
    with pytest.raises(ValueError, match="wrong size"):
        receive(io.BytesIO(data), shape_of, 5, "balanced")
    with pytest.raises(ValueError, match="not the program that was proven"):
        receive(io.BytesIO(data), shape_of, 4, "another")


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_is_made_up_for_here(death: signal.Signals) -> None:
    programs = small()
    programs.build_ahead([1, 0])
    os.kill(ahead_of(programs)._process.pid, death)
    assert digest(programs.program(0)) == digest(small().program(0))
    assert programs.program(1).shape.bucket == programs.sizes[1]


def test_a_process_that_cannot_be_started_or_fails_is_made_up_for_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "failing.py"
    failing.write_text("print('nonsense')")
    monkeypatch.setattr(module, "PROCESS", failing)
    programs = small()
    programs.build_ahead([0])
    assert ahead_of(programs).take((0, False)) is None
    assert programs.program(0).sms == 4
    monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
    programs = small()
    programs.build_ahead([0])
    assert programs.program(0).sms == 4
    programs.close()


def test_what_cannot_be_made_is_refused_by_who_asks() -> None:
    programs = small(policy="none")
    programs.build_ahead([0, 1])
    with pytest.raises(ScheduleError, match="unknown placement policy 'none'"):
        programs.program(0)


def test_no_pytorch_and_no_terminal_over_there() -> None:
    programs = BucketPrograms(PRESETS["llama-3-8b"], sms=132, capacity=20000, itemsize=2)
    programs.build_ahead(range(len(programs.sizes)))
    pid = ahead_of(programs)._process.pid
    assert os.getsid(pid) != os.getsid(0), "Ctrl-C does not reach it"
    assert ahead_of(programs).take((0, False)) is not None
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "numpy" in maps
    assert not any(name in maps for name in ("libtorch", "libcuda", "triton"))
    programs.close()
    assert ahead_of(programs)._process.returncode == -signal.SIGKILL
    assert ahead_of(programs).take((3, False)) is None


@pytest.mark.parametrize("end", ["exit", "exception", "interrupt", "kill"])
def test_it_ends_with_whoever_started_it(end: str) -> None:
    last = {"exit": "", "exception": "raise SystemExit(3)"}.get(end, "time.sleep(60)")
    argv = [sys.executable, "-c", START + last]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        pid = int(process.stdout.readline())
        if end in ("interrupt", "kill"):
            process.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
        status = process.wait(20)
        assert status == {"exit": 0, "exception": 3, "interrupt": -signal.SIGINT, "kill": -signal.SIGKILL}[end]
        said = process.stderr.read()
    assert said == "" or (end == "interrupt" and said.rstrip().endswith("KeyboardInterrupt"))
    assert gone(pid)
