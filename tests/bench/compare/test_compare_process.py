"""One engine's process: its protocol, its limits, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.compare.engines import EngineSpec, worker_command, worker_environment
from bench.compare.process import EngineFailure, EngineProcess
from tests.support.compare_cases import FAKES, HERE

SOON = 60.0  # seconds: far more than anything here takes


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EngineProcess]]:
    """Starts the worker of a fake engine; all are ended with the test."""
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "child"))
    started: list[EngineProcess] = []

    def run(name: str, required: tuple[str, ...] = ("json",), **settings: Any) -> EngineProcess:
        packages = ("pytest", "no-such-thing")
        spec = EngineSpec(name, f"{FAKES}:{name}", name, required, packages=packages, settings=settings, site=str(HERE))
        started.append(EngineProcess(worker_command(spec), worker_environment(spec), tmp_path / f"{name}.log", tmp_path))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def load(process: EngineProcess, model: Path, capacity: int = 64) -> dict[str, object]:
    return process.ask({"op": "load", "spec": {"model": str(model), "capacity": capacity, "kv_bytes": 4}}, SOON)


def generate(process: EngineProcess, tokens: int = 4, timeout: float = SOON) -> dict[str, object]:
    return process.ask({"op": "time", "prompt": [1, 2], "tokens": tokens, "stream": False}, timeout)


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody waits for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_what_an_engine_prints_stays_out_of_the_protocol(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    process = start("Fake")
    loaded = load(process, tmp_path)
    assert loaded["settings"] == {"kind": "fake"} and loaded["streaming"] == "always"
    assert loaded["versions"] == {"python": sys.version.split()[0], "pytest": pytest.__version__}
    measured = generate(process)
    assert measured["tokens"] == [3, 4, 5, 6]
    assert [count for _, count in measured["stamps"]] == [1, 1, 1, 1]  # type: ignore[attr-defined]
    assert "an engine prints what it likes" in process.log.read_text()


def test_scores_come_as_a_file(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    """The fake pads its vocabulary of 96 by 8: the padding is cut off."""
    process = start("Fake")
    load(process, tmp_path)
    path = tmp_path / "scores.npy"
    answer = process.ask({"op": "score", "prefixes": [[1], [1, 2]], "vocabulary": 96, "path": str(path)}, SOON)
    assert answer == {"scoring": "made up"}
    assert np.array_equal(np.load(path), np.full((2, 96), 0.25, dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "message"),
    [("Broken", "RuntimeError: no kernel image for this device"), ("NoSuch", "AttributeError")],
)
def test_a_failing_load_is_told_in_one_line(
    start: Callable[..., EngineProcess], tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(EngineFailure, match=message) as caught:
        load(start(name), tmp_path)
    assert "\n" not in str(caught.value) and not caught.value.missing


def test_a_token_too_few_is_an_error_and_the_engine_lives_on(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    process = start("Short")
    load(process, tmp_path)
    for _ in range(2):
        with pytest.raises(EngineFailure, match="asked for 4 tokens, got 3"):
            generate(process)


def test_no_distributions_is_an_error(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    process = start("Silent")
    load(process, tmp_path)
    with pytest.raises(EngineFailure, match="gives no distributions"):
        process.ask({"op": "score", "prefixes": [[1]], "vocabulary": 96, "path": str(tmp_path / "x.npy")}, SOON)


def test_what_is_not_installed_is_told_apart_from_what_fails(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match="no_such_module") as caught:
        load(start("Fake", required=("json", "no_such_module")), tmp_path)
    assert caught.value.missing
    with pytest.raises(EngineFailure, match="No such file") as caught:
        EngineProcess(["/no/such/python"], {}, tmp_path / "log", tmp_path)
    assert caught.value.missing


def test_settings_reach_the_engine(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    assert load(start("Configured", kind="a b", level=3), tmp_path)["settings"] == {"kind": "a b", "level": "3"}


def test_several_prompts_at_once(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    """One that can, and one that decodes one at a time: it says so, and goes on."""
    request = {"op": "together", "prompts": [[1, 2], [1, 7]], "tokens": 3}
    can, cannot = start("Together"), start("Fake")
    spec = {"model": str(tmp_path), "capacity": 8, "kv_bytes": 1, "batch": 2}
    for process in (can, cannot):
        process.ask({"op": "load", "spec": spec}, SOON)
    found = can.ask(request, SOON)
    assert found["tokens"] == [[3, 4, 5], [8, 9, 10]] and found["seconds"] > 0
    with pytest.raises(EngineFailure, match="its adapter decodes one prompt at a time"):
        cannot.ask(request, SOON)
    assert generate(cannot)["tokens"] == [3, 4, 5, 6]


def test_a_hanging_engine_is_killed_with_its_children(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    process = start("Hanging")
    load(process, tmp_path)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match="no answer to 'time' within 5 s, killed"):
        generate(process, timeout=5.0)
    assert time.monotonic() - began < SOON / 2
    child = int((tmp_path / "child").read_text())
    assert wait_until(lambda: ended(child) and ended(process.process.pid))
    with pytest.raises(EngineFailure):
        generate(process)


def test_a_dead_engine_is_told_with_its_last_words(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    process = start("Dying")
    load(process, tmp_path)
    with pytest.raises(EngineFailure, match="ended .*out of memory"):
        generate(process)


def test_a_paused_engine_takes_no_time_and_goes_on(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    process = start("Fake")
    load(process, tmp_path)
    process.pause()
    stat = Path(f"/proc/{process.process.pid}/stat")
    assert wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    process.resume()
    assert generate(process)["tokens"] == [3, 4, 5, 6]
    process.pause()
    process.close(SOON)  # also from a pause
    assert ended(process.process.pid)


def test_a_killed_parent_leaves_no_paused_engine(tmp_path: Path) -> None:
    """It would hold its GPU memory for ever."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HERE.parent.parent)!r})
from bench.compare.engines import EngineSpec, worker_command, worker_environment
from bench.compare.process import EngineProcess
spec = EngineSpec("Fake", "{FAKES}:Fake", "Fake", site={str(HERE)!r})
here = Path({str(tmp_path)!r})
process = EngineProcess(worker_command(spec), worker_environment(spec), here / "log", here)
process.ask({{"op": "load", "spec": {{"model": str(here), "capacity": 8, "kv_bytes": 1}}}}, {SOON})
process.pause()
print(process.process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: ended(worker))
