"""`bench.drafts`: what its figures are made of, its prompts, and a whole run with the bundled model on the CPU machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import draft_runs, drafts
from bench.draft_runs import DraftBench, TaskRecord, summary
from bench.draft_tasks import CHAT, COPY, Task, prompts_of, read_tasks
from bench.record import Spread
from megakernel.request import SamplingParams
from models.checkpoint import open_checkpoint
from models.errors import UserError
from tests.support import BUNDLED


def test_there_are_prompts_enough_of_every_kind() -> None:
    tasks = read_tasks()
    copies = [task.name.rpartition("-")[0] for task in tasks if task.kind == COPY]
    assert len(copies) >= 20 and {copies.count(name) for name in ("rename", "extract", "spelling", "quote")} == {6}
    assert sum(task.kind == CHAT for task in tasks) >= 10
    assert len({task.prompt for task in tasks}) == len(tasks)
    lengths = [len(ids) for ids in prompts_of(open_checkpoint(str(BUNDLED)), tasks, chat=False)]
    assert min(lengths) > 5 and max(lengths) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is no list of tasks"),
        ('[{"name": "a", "kind": "copy"}]', "task 1 must have"),
        ('[{"name": "a", "kind": "poem", "prompt": "b"}]', r"a kind \(copy or chat\)"),
        ('[{"name": "a", "kind": "copy", "prompt": "b"}, {"name": "a", "kind": "chat", "prompt": "c"}]', "two tasks"),
    ],
)
def test_a_file_of_other_things_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_tasks(path)


class FakeEngine:
    """Gives one text; a token takes `cost` seconds of a clock of its own, and some prompt half a second."""

    def __init__(self, tokens: Sequence[int], cost: float, steps: int, clock: list[float]) -> None:
        self.tokens, self.cost, self.steps, self.clock = list(tokens), cost, steps, clock

    def generate(self, prompt: Sequence[int], limit: int, sampling: SamplingParams, reuse: bool) -> Any:
        assert not reuse
        self.clock[0] += 0.5
        return FakeGeneration(self, self.tokens[:limit], limit)


class FakeGeneration:
    def __init__(self, engine: FakeEngine, tokens: list[int], limit: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.finish_reason = "stop" if len(tokens) < limit else "length"
        self.steps_made = engine.steps

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self.engine.clock[0] += self.engine.cost
            yield token


def bench_of(monkeypatch: pytest.MonkeyPatch, plain: Sequence[int], drafted: Sequence[int]) -> DraftBench:
    clock = [0.0]
    monkeypatch.setattr(draft_runs.time, "perf_counter", lambda: clock[0])
    engines: list[Any] = [FakeEngine(plain, 0.010, len(plain), clock), FakeEngine(drafted, 0.004, 10, clock)]
    return DraftBench(engines[0], engines[1], 32, 3, SamplingParams())


def test_tokens_a_second_come_from_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 tokens 29 count, a hundred and two hundred and fifty a second, whatever the prompt took."""
    record = bench_of(monkeypatch, range(30), range(30)).measure(Task("a", COPY, "b"), [1, 2, 3])
    assert record.plain is not None and record.plain.median == pytest.approx(100)
    assert record.drafted is not None and record.drafted.median == pytest.approx(250)
    assert record.times_plain == pytest.approx(2.5) and record.tokens_per_step == 3.0
    assert (record.prompt, record.tokens, record.finish) == (3, 30, "stop") and len(record.plain.runs) == 3


def test_a_short_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench_of(monkeypatch, range(5), range(5)).measure(Task("a", COPY, "b"), [1])
    assert record.plain is None and record.drafted is None and record.times_plain is None
    assert drafts.task_line(record).endswith("too short to be timed")


def test_another_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, range(30), [*range(20), 7, *range(21, 30)])
    with pytest.raises(RuntimeError, match="a: with drafts the text is another one, from token 20 on"):
        bench.measure(Task("a", COPY, "b"), [1])
    with pytest.raises(RuntimeError, match="from token the end on"):
        bench_of(monkeypatch, range(30), range(29)).measure(Task("a", COPY, "b"), [1])


def record_of(name: str, kind: str, ratio: float | None) -> TaskRecord:
    if ratio is None:
        return TaskRecord(name, kind, 9, 20, "stop", 2.0, None, None, None)
    return TaskRecord(name, kind, 9, 20, "stop", ratio, Spread.of([100.0]), Spread.of([100.0 * ratio]), ratio)


def test_means_over_the_prompts_of_a_kind() -> None:
    """2 and 3 times: 2.5 on average, half a time apart; the one that was too short counts as a prompt alone."""
    records = [record_of("a", COPY, 2.0), record_of("b", COPY, 3.0), record_of("c", COPY, None), record_of("d", CHAT, 1.0)]
    copies, chats = summary(records, COPY), summary(records, CHAT)
    assert copies is not None and chats is not None
    assert (copies.prompts, copies.timed, copies.times_plain, copies.deviation) == (3, 2, 2.5, 0.5)
    assert (copies.least, copies.most, copies.plain, copies.drafted, copies.tokens) == (2.0, 3.0, 100.0, 250.0, 60)
    assert chats.times_plain == 1.0 and summary(records[:3], CHAT) is None
    assert "2.500 times without drafts" in drafts.kind_line(copies)


def test_a_whole_run_on_the_cpu_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draft_runs, "LEAST_TOKENS", 3)  # a token takes a tenth of a second there
    tasks = [{"name": "a", "kind": COPY, "prompt": "a, a, a,"}, {"name": "b", "kind": CHAT, "prompt": "The"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    given = ["--model", str(BUNDLED), "--backend", "vm", "--raw", "--speculate", "1", "--tasks", str(tmp_path / "tasks.json")]
    assert drafts.main([*given, "--tokens", "3", "--runs", "1", "--output", str(tmp_path), "--commit", "c0ffee"]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    [path] = tmp_path.glob("drafts_*.json")
    assert json.loads(path.read_text()) == record and path.name.endswith("_c0ffee.json")
    assert [kind["kind"] for kind in record["kinds"]] == [COPY, CHAT]
    assert all(task["tokens"] == 3 and task["plain"]["median"] > 0 and task["times_plain"] > 0 for task in record["tasks"])
    assert record["tasks"][0]["tokens_per_step"] >= 1 and record["backend"] == "vm"
    assert lines[0].startswith("           a: ") and lines[2].startswith("copy, 1 prompts, 1 timed: ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--backend", "vm", "--model", "random:llama-3.2-1b"], "say --raw"),
        (["--backend", "vm", "--model", str(BUNDLED), "--raw", "--tokens", "2000"], "ask for fewer --tokens"),
        (["--backend", "vm", "--model", "random:llama-3.2-1b", "--weights", "q4_1"], "one token a step"),
        (["--backend", "vm", "--model", str(BUNDLED), "--tasks", "/no/such/file"], "/no/such/file"),
        (["--speculate", "8"], "--speculate"),
        pytest.param([], "needs a GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drafts.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and named in line
