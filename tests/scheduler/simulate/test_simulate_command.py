"""`python -m scheduler.simulate`: a table for people, one line of JSON, and one clear line for a wrong request."""

from __future__ import annotations

import json

import pytest

from scheduler.simulate import __main__ as command
from tests.support import BUNDLED


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_simulate_compares_policies(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(BUNDLED), "--sms", "24", "--policies", "zigzag", "balanced", "--machine", "h200"]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [line.split()[0] for line in lines[2:4]] == ["zigzag", "balanced"]
    steps = {p["policy"]: p["step_us"] for p in result["predictions"]}
    assert result["best"] == min(steps, key=lambda policy: steps[policy]) and result["kind"] == "prediction"
    for p in result["predictions"]:
        assert p["chain_us"] < p["step_us"]
        assert p["idle_us"] == pytest.approx(p["idle_counter_us"] + p["idle_page_us"] + p["idle_done_us"])
        assert p["imbalance"] >= 1.0


def test_a_slower_machine_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for extra in ([], ["--bandwidth", "1e11"], ["--signal", "1e-4"]):
        assert command.main(["--model", str(BUNDLED), "--sms", "8", "--policies", "balanced", *extra]) == 0
        steps.append(last_line(capsys)["predictions"][0]["step_us"])
    assert min(steps[1:]) > steps[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", str(BUNDLED), "--position", "2048"], "positions 0 to 2047"),
        (["--model", str(BUNDLED), "--sms", "201"], "201 SMs"),
        (["--model", str(BUNDLED), "--bandwidth", "0"], "--bandwidth 0.0: use a number above 0"),
        (["--model", str(BUNDLED), "--bandwidth", "5e-324"], "--bandwidth 5e-324: use 1e+06 to 1e+18"),
        (["--model", str(BUNDLED), "--bandwidth", "nan"], "--bandwidth nan: use a number above 0"),
        (["--model", str(BUNDLED), "--signal", "inf"], "--signal inf: use 1e-12 to 1"),
        (["--model", str(BUNDLED), "--copies", "99999999999"], "--copies 99999999999: use 1 to 1e+06"),
        (["--model", str(BUNDLED), "--position", "99999999999"], "positions 0 to 2047"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
