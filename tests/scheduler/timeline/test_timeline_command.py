"""`python -m scheduler.timeline`: all files from a model or from a measured trace, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scheduler.timeline import Point
from scheduler.timeline.__main__ import main
from scheduler.timeline.account import DRAWERS
from scheduler.timeline.anatomy import json_report, text_report
from scheduler.timeline.compare import comparison
from tests.support.configs import small_values
from tests.support.timeline_cases import POSITION, measured, small_program, small_trace


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with a config.json, as a model directory has."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small_values("gqa2", 1024)))
    return str(folder)


@pytest.mark.parametrize("tail", [False, True])
def test_a_simulated_step(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], tail: bool) -> None:
    out = tmp_path / "out"
    assert main(["--model", model, "--sms", "5", "--position", "96", "-o", str(out), *["--tail"] * tail]) == 0
    names = {"simulated-timeline.json", "simulated-timeline.png", "simulated-anatomy.txt", "simulated-anatomy.json"}
    assert {path.name for path in out.iterdir()} == names
    printed = capsys.readouterr().out
    assert printed == (out / "simulated-anatomy.txt").read_text()
    assert "simulated (h100): position 96, 5 SMs" in printed and "down waits for gate_up" in printed
    assert f"qkv waits for {'hand_over' if tail else 'embed'}" in printed
    report = json.loads((out / "simulated-anatomy.json").read_text())
    assert sum(drawer["share"] for drawer in report["drawers"].values()) == pytest.approx(1)


def test_a_measured_step_beside_its_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A measurement twice as slow as the simulation: the error must be -50 %, in the step and in every instruction."""
    known = small_trace()
    stamps = 2 * known.stamps + 1
    stamps[:, :, [Point.LOAD_WAITED, Point.PAGE_WAITED]] -= 1
    without = known.stamps[:, :, Point.LOAD_BEGUN] < 0
    stamps[without, Point.LOAD_BEGUN] = stamps[without, Point.LOAD_ENDED] = 0
    trace = measured(small_program(), stamps)
    trace.save(tmp_path / "slow.npz")
    out = tmp_path / "out"
    assert main(["--trace", str(tmp_path / "slow.npz"), "-o", str(out)]) == 0
    assert {path.name.partition("-")[0].partition(".")[0] for path in out.iterdir()} == {"measured", "simulated", "comparison"}
    printed = capsys.readouterr().out
    assert "measured (none)" in printed and "off by -5" in printed
    found = comparison(known, trace)
    assert found["error"] == pytest.approx(-0.5, abs=1e-3)
    for predicted, seen in found["instructions_us"].values():
        assert predicted == pytest.approx(seen / 2, abs=1e-3)
    assert set(found["drawers_us"]) == set(DRAWERS)


def test_reports_agree() -> None:
    """The text says what the JSON says."""
    report, text = json_report(small_trace()), text_report(small_trace())
    assert f"a step takes {report['step_us']:.1f} us" in text
    for name, words in DRAWERS.items():
        assert f"  {words:<42}{report['drawers'][name]['share']:>8.1%}{report['drawers'][name]['us']:>9.1f}" in text
    hops = report["critical_path"]["hops"]
    assert sum(hop["length"] for hop in hops) / 1e3 == pytest.approx(report["steps_us"][-1])
    assert f"critical path: {len(hops)} hops" in text
    assert len(report["bandwidth"]["gb_per_s"]) == len(report["bandwidth"]["begin_us"])


MISTAKES = [
    ([], "say --model MODEL to simulate, or --trace FILE"),
    (["--model", "nowhere"], "nowhere: neither a directory nor a preset"),
    (["--model", "{model}", "--position", "2000"], "--position 2000: a cache of"),
    (["--model", "{model}", "--position", "-1"], "--position -1: a cache of"),
    (["--model", "{model}", "--sms", "0"], "0 SMs asked for"),
    (["--model", "{model}", "--tokens", "0"], "0 tokens to simulate"),
    (["--model", "{model}", "--tokens", "999999999"], "--tokens: must be a whole number from 0 to 100"),
    (["--model", "{model}", "--capacity", "99999999999"], "a capacity of 99999999999 tokens does not suit this model"),
    (["--model", "{model}", "-o", ""], "is empty: name a place to write to"),
    (["--model", "{model}", "--sms", "3", "--window", "9:3"], "shows nothing"),
    (["--model", "{model}", "--sms", "3", "--window", "nan:inf"], "shows nothing"),
    (["--trace", "{model}/config.json"], "config.json: not a saved program"),
    (["--trace", "{model}/nowhere"], "nowhere: no such"),
    (["--model", "{model}", "-o", "{model}/config.json"], "config.json: cannot be written"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES)
def test_mistakes(model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    output = [] if "-o" in arguments else ["-o", model + "/out"]
    assert main([argument.format(model=model) for argument in [*arguments, *output]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1


def test_the_position_is_the_traces() -> None:
    assert json_report(small_trace())["position"] == POSITION
