"""Figures from raw records: worked out by hand, and blind to which engine is which."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest

from bench.compare import kernels, summary
from bench.compare.engines import BASELINE, REGISTRY
from bench.compare.report import report
from bench.compare.worker import timed
from tests.support.compare_cases import Record, engine, record, run
from tests.support.fake_engines import Fake, Whole, fake_event

POSITIONS = 40
EVEN = [1e-4 + 1e-6 * (place % 3) for place in range(POSITIONS)]
NEUTRAL = ["contestant", "session", "worker", "process", "plan", "floor", "reference"]
NEUTRAL += ["fidelity", "summary", "report", "charts", "merge", "kernels"]


def test_milliseconds_a_token_come_from_the_difference() -> None:
    """Short 10 ms, long 10 + 4 * 2 ms: 2 ms for each of the 4 tokens between, whatever the prefill took."""
    [row] = summary.rows([run([engine("a", "A", [2.0, 3.0, 2.5], None)])])
    first, second = row.speeds
    assert (first.context, second.context) == (8, 16)
    for step, runs in ((first.step, [2.0, 3.0, 2.5]), (second.step, [3.0, 4.0, 3.5])):
        assert step.runs == runs
        assert [step.median, step.least, step.most] == pytest.approx([runs[2], runs[0], runs[1]])
    assert first.tokens_per_second == pytest.approx(400.0)
    assert first.first_token.median == pytest.approx(10.0) and second.first_token.median == pytest.approx(20.0)


def test_share_of_the_read_floor_counts_the_cache() -> None:
    """2 GB at the faster of two measured rates, 1 TB/s, take 2 ms; at context 16 3 GB take 3 ms."""
    [row] = summary.rows([run([engine("a", "A", [2.5], None)])])
    assert [entry.floor for entry in row.speeds] == pytest.approx([2.0, 3.0])
    assert [entry.floor_share for entry in row.speeds] == pytest.approx([2.0 / 2.5, 3.0 / 3.5])


def test_no_floor_no_share() -> None:
    measured = run([engine("a", "A", [2.5], None)])
    measured["floor"] = [{"bytes_per_second": None}]
    [row] = summary.rows([measured])
    assert row.speeds[0].floor is None and row.speeds[0].floor_share is None
    assert "| A " in report(record(measured))


def test_streamed_times_begin_after_the_first_piece() -> None:
    """Pieces of 2, 2 and 1 tokens at 5, 9 and 14 ms: 3 tokens in 9 ms, the longest wait 5 ms."""
    pieces = [{"stamps": [[0.005, 2], [0.009, 2], [0.014, 1]]}]
    assert summary.streamed_times(pieces) == pytest.approx([3.0])
    assert summary.longest_gaps(pieces) == pytest.approx([5.0])


@pytest.mark.parametrize("stamps", [None, [], [[0.01, 5]]])
def test_one_piece_is_no_stream(stamps: list[list[float]] | None) -> None:
    assert summary.streamed_times([{"stamps": stamps}]) == [] and summary.longest_gaps([{"stamps": stamps}]) == []


def test_less_faithful_rows_are_marked_and_only_they() -> None:
    """Twice the baseline's KL at every position is no accident; a thousandth more, up and down, is."""
    wobble = [value * (1.001 if place % 2 else 0.999) for place, value in enumerate(EVEN)]
    engines = [
        engine(BASELINE, "baseline", [9.0], EVEN),
        engine("worse", "worse", [1.0], [2 * value for value in EVEN]),
        engine("same", "same", [2.0], wobble),
        engine("better", "better", [3.0], [value / 2 for value in EVEN]),
    ]
    marks = {row.name: row.fidelity.less_faithful for row in summary.rows([run(engines)]) if row.fidelity}
    assert marks == {BASELINE: False, "worse": True, "same": False, "better": False}
    text = report(record(run(engines)))
    assert "| worse † " in text and "† |" not in text.replace("worse †", "")
    assert "| same † " not in text and "| better † " not in text and "| baseline † " not in text


def test_nll_marks_too() -> None:
    judged = engine("worse", "worse", [1.0], EVEN)
    judged["fidelity"]["nll"] = [1.1] * POSITIONS
    found = {row.name: row for row in summary.rows([run([engine(BASELINE, "baseline", [9.0], EVEN), judged])])}
    assert found["worse"].fidelity is not None and found["worse"].fidelity.less_faithful
    assert found["worse"].fidelity.nll_excess == pytest.approx(0.1)


def test_without_a_baseline_nothing_is_claimed() -> None:
    [row] = summary.rows([run([engine("a", "A", [1.0], EVEN)])])
    assert row.fidelity is not None and row.fidelity.less_faithful is None


def swapped(text: str, one: str, other: str) -> str:
    return text.replace(one, "\0").replace(other, one).replace("\0", other)


def test_swapping_two_engines_names_changes_nothing_but_the_labels() -> None:
    """Also that our own engine is not the one that is treated otherwise: it is one of the two."""
    ours, theirs = "megakernel", "vllm"
    engines = [
        engine(ours, "Label1", [2.0, 2.2], EVEN),
        engine(BASELINE, "baseline", [9.0, 9.9], EVEN),
        engine(theirs, "Label2", [1.0, 1.2], [3 * value for value in EVEN]),
    ]
    renamed = copy.deepcopy(engines)
    for found, name, label in ((renamed[0], theirs, "Label2"), (renamed[2], ours, "Label1")):
        found["name"], found["label"] = name, label
    rows, again = summary.rows([run(engines)]), summary.rows([run(renamed)])
    assert [vars(row) | {"name": "", "label": ""} for row in rows] == [vars(row) | {"name": "", "label": ""} for row in again]
    assert swapped(report(record(run(engines))), "Label1", "Label2") == report(record(run(renamed)))


class Ticking:
    """A clock that a fake engine turns: every look costs a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.mark.parametrize("adapter", [Fake, Whole])
def test_every_engine_is_timed_by_the_same_code(adapter: type[Fake]) -> None:
    """What the stopwatch sees depends on when tokens come, not on who sends them."""
    found = adapter()
    found.capacity = 100
    measured = timed(found, {"prompt": [3, 4], "tokens": 3, "stream": True}, Ticking())
    assert measured["tokens"] == [5, 6, 7]
    assert measured["stamps"] == [[pytest.approx(0.001 * place), 1] for place in (1, 2, 3)]
    assert measured["seconds"] == pytest.approx(0.004)


@pytest.mark.parametrize("module", NEUTRAL)
def test_no_shared_code_knows_an_engine_by_name(module: str) -> None:
    """A special case for one engine would have to name it."""
    path = Path(summary.__file__).with_name(f"{module}.py")
    texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    code = [text for text in texts if isinstance(text, str) and len(text.split()) == 1]  # prose has several words
    assert not {text for text in code for spec in REGISTRY if text in (spec.name, spec.label)}


def test_what_was_not_measured_is_told_with_its_mend() -> None:
    gone: Record = engine("gone", "Gone", [1.0], None) | {"status": "missing", "error": "no gone"}
    failed: Record = engine("bad", "Bad", [1.0], None) | {"status": "failed", "error": "it broke"}
    gone["install"], failed["install"] = "pip install gone", "pip install bad"
    text = report(record(run([engine("a", "A", [1.0], None), gone, failed])))
    assert "- Gone: no gone\n  install: pip install gone" in text
    assert "- Bad: it broke\n" in text and "pip install bad" not in text
    assert "- A: not scored" in text


def test_one_row_an_engine_of_several_runs_and_how_far_they_agree() -> None:
    first = run([engine("a", "A", [2.0], None), engine("b", "B", [1.0], None) | {"status": "missing", "error": "no b"}])
    second = run([engine("a", "A", [2.2], None), engine("b", "B", [4.0], None)])
    rows = summary.rows([first, second])
    assert [(row.name, row.run) for row in rows] == [("a", 0), ("b", 1)]
    assert [row.speeds[0].step.median for row in rows] == pytest.approx([2.0, 4.0])
    assert summary.absent([first, second]) == []
    again = list(summary.agreement([first, second]))
    assert [entry[:3] for entry in again] == [("A", 8, 1), ("A", 16, 1)]
    assert [entry[3] for entry in again] == pytest.approx([1.1, 3.2 / 3.0])


def test_a_batch_counts_the_tokens_of_all() -> None:
    """4 prompts, 5 tokens each: 10 ms and 4 steps of 2 make 18 ms, in which 20 tokens came; a step takes as long as it took."""
    batch = run([engine("a", "A", [2.0], EVEN), engine("b", "B", [1.0], EVEN)])
    batch["settings"]["batch"] = 4
    row, faster = summary.rows([batch])
    assert row.speeds[0].batch == 4 and row.speeds[0].step.median == pytest.approx(2.0)
    assert row.speeds[0].whole.median == pytest.approx(20 / 0.018)
    assert faster.speeds[0].whole.median == pytest.approx(20 / 0.014)
    assert row.speeds[0].tokens_per_second == pytest.approx(4 / 0.002)
    text = report(record(batch))
    assert "4 prompts of 8 tokens at once (read floor of bf16 weights: 2.000 ms a step)" in text
    cells = [[cell.strip() for cell in line.split("|")][1:3] for line in text.splitlines() if line.startswith(("| A", "| B"))]
    assert cells[:2] == [["B", "1429"], ["A", "1111"]], "the most tokens a second first"


EVENTS = [
    fake_event("aten::copy_", "CPU", 9.0),
    fake_event("two", "CUDA", 3.0),
    fake_event("one", "CUDA", 1.0),
    fake_event("two", "CUDA", 4.0),
    fake_event("Memset (Device)", "CUDA", 0.5),
    fake_event("cublas_gemm", "CUDA", 2.0),
    fake_event("ProfilerStep#1", "CUDA", 99.0, annotation=True),
    fake_event("void elementwise_kernel<128, 2, direct_copy_kernel_cuda()>", "CUDA", 0.25),
]


def test_kernels_are_told_apart() -> None:
    found = kernels.tally(EVENTS, {"one", "two", "three"})
    assert [(kernel["name"], kernel["kind"], kernel["count"], kernel["microseconds"]) for kernel in found] == [
        ("two", "own", 2, 7.0), ("cublas_gemm", "other", 1, 2.0), ("one", "own", 1, 1.0), ("Memset (Device)", "memory", 1, 0.5),
        ("void elementwise_kernel<128, 2, direct_copy_kernel_cuda()>", "memory", 1, 0.25),
    ]  # fmt: skip


def test_a_report_of_kernels() -> None:
    own = kernels.tally(EVENTS[:5], {"one", "two"})
    listed: Record = {"written_in": "Triton", "kernels": own, "context": 512, "tokens": 16}
    measured = run([engine("a", "A", [2.0], None) | {"kernels": listed}, engine("b", "B", [2.0], None)])
    text = report(record(measured))
    assert "Kernels of A while it generated 16 tokens after a prompt of 512, by a profile: all 2 are Triton, its own" in text
    assert "copy or fill of memory" in text and "Kernels of B" not in text
    measured["engines"][1]["kernels"] = {"error": "no profiler"}
    assert "Kernels of B: not listed, no profiler" in report(record(measured))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profile_without_kernels_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        kernels.watched(lambda: None, lambda: {"one"})


def test_the_report_says_what_the_record_says() -> None:
    text = report(record(run([engine("a", "A", [2.5], EVEN)])))
    assert "Prompt of 8 tokens (read floor of bf16 weights: 2.000 ms a token)" in text
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith("| A ")).split("|")]
    assert cells == ["", "A", "2.500", "2.500–2.500", "2.500", "400", "80%", "10.0", "10.0–10.0", ""]
    assert "SM clock 1500–1980 MHz, 40–50 °C" in text and "0.900 and 1.000 TB/s" in text
    assert "- A (python 3.12): graphs: yes" in text
