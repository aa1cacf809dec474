"""Whole comparisons on the CPU, with fake engines: who is told what, in which order, and what is left behind."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.compare import session
from bench.compare.cli import main
from bench.compare.contestant import Contestant
from bench.compare.process import EngineProcess
from tests.bench.compare.test_compare_process import ended
from tests.support.compare_cases import FAKES, HERE, save_small

FAST = ["--contexts", "8,16", "--tokens", "6", "--timeout", "60", "--start-timeout", "120"]


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "child"))


@pytest.fixture
def engines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without read floor and reference, whose processes take seconds to import torch."""
    monkeypatch.setattr(session.Session, "measure_floor", lambda self: None)
    monkeypatch.setattr(session.Session, "make_reference", lambda self: False)


def compare(model: Path, output: Path, names: str, *more: str) -> tuple[int, dict[str, Any]]:
    """Run `python -m bench.compare` in this process; its status and its record."""
    engines = ",".join(f"{FAKES}:{name}" if name[0].isupper() else name for name in names.split(","))
    places = [f"--engine={name}={sys.executable}:{HERE}" for name in engines.split(",") if ":" in name]
    status = main(["--model", str(model), "--output", str(output), "--engines", engines, *places, *FAST, *more])
    return status, json.loads((output / "comparison.json").read_text())


def by_name(record: dict[str, Any]) -> dict[str, Any]:
    return {engine["name"].rpartition(":")[2]: engine for engine in record["runs"][0]["engines"]}


@pytest.mark.slow
def test_good_bad_and_missing_engines(small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One comparison with everything that can happen to an engine; every one of them is in the report."""
    output = tmp_path / "out"
    names = "Fake,Whole,Silent,Broken,Dying,NotANumber,vllm"
    status, record = compare(small_checkpoint, output, names, "--repeats", "2", "--note", "a remark", "--commit", "c0ffee")
    engines = by_name(record)
    assert status == 0
    assert {name: engine["status"] for name, engine in engines.items()} == {
        "Fake": "measured", "Whole": "measured", "Silent": "measured", "NotANumber": "measured",
        "Broken": "failed", "Dying": "failed", "vllm": "missing",
    }  # fmt: skip
    for context in ("8", "16"):
        for name in ("Fake", "Whole", "Silent"):
            repeats = engines[name]["timings"][context]
            assert len(repeats) == 2 and all(min(entry["short"], entry["long"]) > 0 for entry in repeats)
            assert [len(entry["stamps"] or ()) for entry in repeats] == [0 if name == "Silent" else 6] * 2
            assert engines[name]["greedy"][context]["repeatable"]
    assert len(engines["Fake"]["fidelity"]["kl"]) == 4 * 32
    assert engines["Silent"]["fidelity"]["error"].endswith("gives no distributions")
    assert "not finite" in engines["NotANumber"]["fidelity"]["error"]
    run = record["runs"][0]
    assert run["reference"] == {"device": "cpu", "positions": 4 * 32} and run["note"] == "a remark"
    text = (output / "comparison.md").read_text()
    assert run["machine"]["commit"] == "c0ffee" and "commit c0ffee" in text
    assert capsys.readouterr().out.startswith(text)
    for name in engines:
        assert (f"{FAKES}:{name}" if name != "vllm" else "- vLLM: its Python has no vllm\n  install: ") in text
    assert re.search(r"Dying: its process ended .*out of memory", text)
    assert {path.name for path in output.iterdir()} >= {"latency.png", "latency.svg", "fidelity.png", "fidelity.svg"}
    assert "an engine prints" in (output / "logs" / f"{FAKES}-Fake.log").read_text()


@pytest.mark.usefixtures("engines_only")
def test_engines_take_turns_in_a_changing_order(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    take = Contestant.turn

    def noted(self: Contestant) -> None:
        turns.append(self.spec.name[-5:])
        take(self)

    monkeypatch.setattr(Contestant, "turn", noted)
    status, record = compare(small_checkpoint, tmp_path / "out", "Fake,Whole", "--repeats", "3")
    assert status == 0
    assert turns == [":Fake", "Whole", "Whole", ":Fake", ":Fake", "Whole"]
    assert all(len(engine["timings"]["8"]) == 3 for engine in by_name(record).values())


@pytest.mark.usefixtures("engines_only")
def test_a_batch_is_decoded_together(small_checkpoint: Path, tmp_path: Path) -> None:
    """Two prompts of each length; an engine that takes one at a time is told of, and so are kernels."""
    output = tmp_path / "out"
    status, record = compare(small_checkpoint, output, "Together,Fake", "--repeats", "1", "--batch", "2")
    engines, run = by_name(record), record["runs"][0]
    assert status == 0 and run["settings"]["batch"] == 2
    for context in ("8", "16"):
        [repeat] = engines["Together"]["timings"][context]
        first, second = repeat["tokens"]
        assert len(first) == len(second) == 6 and first != second and not repeat["stamps"]
    [row] = record["summary"]["rows"]
    assert [entry["batch"] for entry in row["speeds"]] == [2, 2]
    assert engines["Fake"]["status"] == "failed"
    text = (output / "comparison.md").read_text()
    assert "2 prompts of 16 tokens at once" in text and "one prompt at a time" in text
    assert "2 prompts of one length at once, after each 6 tokens" in text


def test_engines_make_up_weights_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a preset they get the configuration, and none is judged; one that must have files is told of."""
    monkeypatch.setattr(session.Session, "measure_floor", lambda self: None)
    output = tmp_path / "out"
    status, record = compare(Path("random:smollm2-135m"), output, "MakesWeights,Fake", "--repeats", "1")
    engines, run = by_name(record), record["runs"][0]
    assert status == 0 and engines["MakesWeights"]["settings"] == {"weights": "random:smollm2-135m"}
    assert engines["Fake"]["status"] == "failed" and "makes up no weights" in engines["Fake"]["error"]
    assert [path.name for path in (output / "model").iterdir()] == ["config.json"]
    assert "fidelity" not in engines["MakesWeights"] and "reference" not in run and "no fidelity" in run["notes"][0]


@pytest.mark.usefixtures("engines_only")
def test_kernels_are_listed_from_a_profile(small_checkpoint: Path, tmp_path: Path) -> None:
    _, record = compare(small_checkpoint, tmp_path / "out", "Profiled,Fake", "--repeats", "1")
    engines = by_name(record)
    assert "kernels" not in engines["Fake"]
    found = engines["Profiled"]["kernels"]
    assert (found["context"], found["tokens"], found["written_in"]) == (16, 6, "Triton")
    assert found["kernels"][0] == {"name": "decode", "kind": "own", "count": 2, "microseconds": 61.0}
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "while it generated 6 tokens after a prompt of 16, by a profile: 1 of 2 are Triton, its own; 1 are others" in text
    assert re.search(r"\| decode +\| +Triton, its own \| +2 \| +61 \|", text)


@pytest.mark.usefixtures("engines_only")
def test_a_hanging_engine_ends_alone(small_checkpoint: Path, tmp_path: Path) -> None:
    _, record = compare(small_checkpoint, tmp_path / "out", "Hanging,Fake", "--repeats", "1", "--start-timeout", "6")
    engines = by_name(record)
    assert engines["Hanging"]["error"].startswith("no answer to 'time' within 6 s, killed")
    assert engines["Fake"]["status"] == "measured"
    assert ended(int((tmp_path / "child").read_text()))


@pytest.mark.usefixtures("engines_only")
def test_the_time_limit_is_kept_and_told(small_checkpoint: Path, tmp_path: Path) -> None:
    """With less time than is kept back for scores nothing is started, and that is said."""
    status, record = compare(small_checkpoint, tmp_path / "out", "Fake", "--time-limit", "15")
    assert status == 1
    assert by_name(record)["Fake"]["error"] == "not started: the time limit was near"
    assert "not started: the time limit was near" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.usefixtures("engines_only")
def test_an_interrupt_leaves_a_record_and_no_process(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes: list[EngineProcess | None] = []

    def interrupted(self: session.Session) -> None:
        processes.extend(contestant.process for contestant in self.contestants)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "take_turns", interrupted)
    status, record = compare(small_checkpoint, tmp_path / "out", "Fake")
    assert status == 130 and by_name(record)["Fake"]["ready_seconds"] > 0
    assert "interrupted" in capsys.readouterr().err
    assert len(processes) == 1 and all(process is not None and ended(process.process.pid) for process in processes)
