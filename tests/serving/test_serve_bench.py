"""What `bench.serve` computes, and its client against a real server; what it measures needs no test to be slow."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import pytest

from bench.serve import WARM, engine_alone, line, load_record, overhead, percentiles, prompts, served_stream, together
from bench.serve_chart import draw
from bench.serve_client import Answer, Load, Reading, Stream, open_loop
from tests.support import BUNDLED
from tests.support.cli_fakes import ids_of
from tests.support.scripted import SLOW
from tests.support.served import Served


def test_percentiles_are_values_that_were_there() -> None:
    assert percentiles([float(value) for value in range(1, 101)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3, "p95": 3, "p99": 3}
    assert percentiles([2.0, 1.0]) == {"p50": 1, "p95": 2, "p99": 2}


STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    b'5a\r\ndata: {"choices":[{"text":"a","finish_reason":null}]}\n\n\r\n'
    b'5a\r\ndata: {"choices":[{"text":"b","finish_reason":null}]}\n\n'
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n\r\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":17,"total_tokens":20}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("size", [1, 7, 50, 10**4])
def test_an_answer_is_read_wherever_it_is_cut(size: int) -> None:
    reading, chunks = Reading(0.0), [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    ends = [reading.take(chunk, float(number + 1)) for number, chunk in enumerate(chunks)]
    assert ends[-1] and not any(ends[:-1])
    answer = reading.answer
    assert (answer.status, answer.tokens) == (200, 17) and len(answer.pieces) == (1 if size > 1000 else 2)


def test_a_refusal_is_no_answer() -> None:
    reading = Reading(0.0)
    assert reading.take(b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}", 1.0)
    assert reading.answer.status == 503 and not reading.answer.pieces


def test_no_prompt_begins_like_another() -> None:
    made = prompts(8, 20, 2048)
    assert len(made) == 20 and len({prompt[0] for prompt in made}) > 18 and made == prompts(8, 20, 2048)


def test_the_engine_alone_and_the_server_beside_it(model_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.serve.NAME", "bundled")
    asked = prompts(8, WARM + 2, 2048)
    engine, served = engine_alone(str(BUNDLED), "torch", 512, 8, asked, 6), served_stream(model_server.url, asked, 6)
    found = overhead(engine, served)
    assert len(found["first_ms"]["engine"]["runs"]) == len(found["first_ms"]["served"]["runs"]) == 2
    cost = found["first_ms"]["served"]["median"] - found["first_ms"]["engine"]["median"]
    assert found["cost_ms"]["first_ms"] == pytest.approx(cost, abs=1e-3)
    assert found["within_limits"] == (cost <= 1.0 and found["cost_ms"]["ms_per_token"] <= 0.03)


def test_an_open_loop_waits_for_nobody_and_its_record_is_drawn(scripted_server: Served, tmp_path: Path) -> None:
    load = Load(100.0, 20, (2, 8), (1, 12), 2048, seed=1)
    answers = asyncio.run(open_loop(scripted_server.url, "bundled", load))
    assert [answer.status for answer in answers] == [200] * 20 and all(1 <= answer.tokens <= 12 for answer in answers)
    assert any(later.sent < earlier.pieces[-1] for earlier, later in zip(answers, answers[1:], strict=False))
    record = load_record(load, 0.5, [*answers, Answer(0.0, status=503)])
    assert record["answered"] == 20 and "50% of capacity" in line(record)
    assert b"<svg" in draw({"loads": [record, record | {"share": 0.9}]}, tmp_path / "picture.svg").read_bytes()
    assert json.dumps(record)


def test_streams_together_are_counted_together(scripted_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.serve.NAME", "bundled")
    slow = ids_of(SLOW)  # launches far longer than what a busy machine takes for the requests
    asked = [[*slow, number] for number in range(8)]
    one, eight = (together(scripted_server.url, asked, 8, streams) for streams in (1, 8))
    assert eight > 1.5 * one, "it decodes them together"


def test_a_connection_asks_one_after_the_other(scripted_server: Served) -> None:
    stream = Stream(scripted_server.url)
    slow = ids_of(SLOW)  # so that an answer's pieces do not come at once, however busy the machine
    answers = [stream.ask("bundled", [*slow, number], 24) for number in range(3)]
    stream.close()
    assert [answer.tokens for answer in answers] == [24] * 3
    assert all(answer.first_ms > 0 and answer.ms_per_token > 0 for answer in answers)
    assert all(before.pieces[-1] < after.sent for before, after in pairwise(answers))


def test_times_of_an_answer() -> None:
    answer = Answer(1.0, pieces=[1.25, 1.5, 2.25], tokens=5)
    assert answer.first_ms == 250 and answer.ms_per_token == 250 and answer.gaps_ms == [250, 750]
    assert Answer(1.0, pieces=[1.25], tokens=1).ms_per_token == 0
