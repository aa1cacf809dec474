"""What a run prints, and where, with an engine that says what it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import run_llama1b
from megakernel.request import SamplingParams
from tests.support import BUNDLED
from tests.support.cli_fakes import EOS, FakeEngine, FakeGeneration, Loader, ids_of

TEXT = " naïve 日本 😀 text"


def run(capsys: pytest.CaptureFixture[str], engine: FakeEngine, *argv: str) -> tuple[int, str, str]:
    """(status, stdout, stderr)"""
    status = run_llama1b.main(list(argv), Loader(engine))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_text_goes_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, FakeEngine([*ids_of(TEXT), EOS]), "--prompt", "A")
    assert (status, out) == (0, TEXT + "\n")
    first, last = err.splitlines()
    assert first.startswith(f"{BUNDLED} on vm, loaded in ")
    assert last.startswith(f"{len(ids_of(TEXT)) + 1} tokens (stop), first after ")
    assert "ms/token" in last


def test_every_piece_is_flushed_before_the_next_token_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    class Watching(FakeGeneration):
        def __iter__(self) -> Any:
            for token in super().__iter__():
                seen.append(capsys.readouterr().out)
                yield token

    engine = FakeEngine(ids_of("one two three"))
    engine.generation = Watching
    run_llama1b.main(["--prompt", "A"], Loader(engine))
    pieces = [*seen[1:], capsys.readouterr().out]
    assert "".join(pieces) == "one two three\n"
    assert all(pieces)


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [*ids_of(TEXT), EOS]
    status, out, _ = run(capsys, FakeEngine(tokens, pause=0.002), "--prompt", "A", "--json")
    assert status == 0
    assert out.count("\n") == 1
    found = json.loads(out)
    times = {name: found.pop(name) for name in ("ttft_ms", "ms_per_token", "tokens_per_second")}
    assert found == {
        "model": str(BUNDLED),
        "backend": "vm",
        "prompt_token_ids": [0, *ids_of("A")],
        "kept_tokens": 0,
        "token_ids": tokens,
        "text": TEXT,
        "finish_reason": "stop",
    }
    assert times["ttft_ms"] >= 2  # the engine sleeps as long before each token
    assert times["ms_per_token"] >= 2
    assert times["tokens_per_second"] == pytest.approx(1000 / times["ms_per_token"], rel=1e-2)  # both rounded to 1e-3


def test_one_token_has_no_time_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, FakeEngine(ids_of("a b c")), "--prompt", "A", "--json", "--max-tokens", "1")
    found = json.loads(out)
    assert (found["finish_reason"], len(found["token_ids"])) == ("length", 1)
    assert (found["ms_per_token"], found["tokens_per_second"]) == (None, None)
    assert "ms/token" not in err


def test_all_arguments_reach_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    loader = Loader(FakeEngine(ids_of("x")))
    argv = [
        "--prompt=A",
        "--max-tokens=7",
        "--temperature=0.5",
        "--top-k=3",
        "--top-p=0.25",
        "--seed=9",
        "--sms=4",
        "--speculate=3",
    ]
    assert (
        run_llama1b.main([*argv, "--backend=vm", "--context=99", "--weights=int4", "--head=fp8", f"--model={BUNDLED}"], loader)
        == 0
    )
    assert loader.asked == {
        "model": str(BUNDLED), "backend": "vm", "sms": 4, "capacity": 99, "weights": "int4", "head": "fp8", "speculate": 3,
        "sequences": None,
    }  # fmt: skip
    expected = SamplingParams(temperature=0.5, top_k=3, top_p=0.25, seed=9, stop_token_ids=(EOS,))
    assert loader.engine.started == ([0, *ids_of("A")], 7, expected)
    assert loader.engine.closed


def test_the_closing_line_tells_tokens_a_step_where_there_are_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (([], False), (["--speculate", "0"], False), (["--speculate"], True), (["--speculate", "1"], True)):
        assert run_llama1b.main(["--prompt", "A", *options], Loader(FakeEngine(ids_of("abcde")))) == 0
        assert (", 1.00 tokens a step" in capsys.readouterr().err) == told


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert run_llama1b.parse([]) == run_llama1b.Options()
    assert SamplingParams(**run_llama1b.parse([]).drawn) == SamplingParams()


def test_chat_sends_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    loader = Loader(FakeEngine(ids_of("x")))
    assert run_llama1b.main(["--prompt", "A", "--chat"], loader) == 0
    assert loader.engine.started is not None
    assert loader.engine.started[0] == [0, 3, *ids_of("A"), EOS, 4]


def test_random_weights_speak_in_ids(capsys: pytest.CaptureFixture[str]) -> None:
    loader = Loader(FakeEngine([300, 7, 128000]))
    assert run_llama1b.main(["--model", "random:llama-3.2-1b", "--prompt", "é"], loader) == 0
    captured = capsys.readouterr()
    assert loader.engine.started is not None
    assert loader.engine.started[0] == [0xC3, 0xA9]
    assert captured.out == "300 7 128000\n"
    assert "token ids come out in place of words" in captured.err


def test_ctrl_c_keeps_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(ids_of("one two three"), interrupt_at=2)
    status, out, err = run(capsys, engine, "--prompt", "A")
    assert status == 130
    assert out.strip()
    assert "one two three".startswith(out.rstrip("\n"))
    assert "(interrupted)" in err
    assert "Traceback" not in err
    assert engine.stopped
    assert engine.closed


def test_ctrl_c_in_the_middle_of_a_character_prints_no_half_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ids_of("😀")
    assert len(tokens) > 2  # or there is no middle
    status, out, _ = run(capsys, FakeEngine(tokens, interrupt_at=2), "--prompt", "A", "--json")
    assert status == 130
    found = json.loads(out)
    assert (found["token_ids"], found["text"]) == (tokens[:2], "\N{REPLACEMENT CHARACTER}")


def test_ctrl_c_still_prints_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ids_of("one two three")
    status, out, _ = run(capsys, FakeEngine(tokens, interrupt_at=3), "--prompt", "A", "--json")
    found = json.loads(out)
    assert (status, found["finish_reason"], found["token_ids"]) == (130, "interrupted", tokens[:3])


def test_ctrl_c_while_loading_prints_an_object_without_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    assert run_llama1b.main(["--prompt", "A", "--json"], load) == 130
    found = json.loads(capsys.readouterr().out)
    assert (found["finish_reason"], found["token_ids"], found["text"], found["backend"]) == ("interrupted", [], "", None)
    assert found["prompt_token_ids"] == [0, *ids_of("A")]


def test_an_error_while_loading_or_starting_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(ids_of("x"))
    for argv in (["--max-tokens", "600"], ["--max-tokens", "600", "--json"]):
        status, out, err = run(capsys, engine, "--prompt", "A", *argv)
        assert (status, out) == (2, "")
        assert err == "error: 2 prompt tokens and 600 more exceed the capacity of 512\n"
    assert engine.closed


def test_loading_is_drawn_and_wiped_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, out, err = run(capsys, FakeEngine(ids_of("x")), "--prompt", "A")
    assert f"\r\x1b[Kloading {BUNDLED}: 50 %" in err
    assert f"100 %\r\x1b[K{BUNDLED} on vm" in err
    assert out == "x\n"


@pytest.mark.parametrize("missing", ["tokenizer.json", "chat template"])
def test_a_model_without_its_text_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, missing: str) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if name != missing:
            (tmp_path / name).symlink_to(BUNDLED / name)
    status, out, err = run(capsys, FakeEngine([]), "--model", str(tmp_path), "--chat")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} has no {missing}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_reading_a_long_prompt_is_drawn_and_wiped_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """On a terminal, before the text begins; of a prompt that is read at one go nothing is said."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    for chunk, drawn in ((4096, []), (2, [2, 4])):
        engine = FakeEngine(ids_of("x"))
        engine.chunk = chunk
        _, out, err = run(capsys, engine, "--prompt", "A b c d")
        assert engine.started is not None and out == "x\n"
        total = len(engine.started[0])
        lines = [f"\r\x1b[Kreading the prompt: {done} of {total} tokens" for done in drawn if terminal]
        assert total in (5, 6) and "".join([*lines, "\r\x1b[K" * bool(lines), "1 tokens (length)"]) in err.replace("\n", "")
        assert err.count("reading the prompt") == len(lines)


def test_what_was_kept_of_the_prompt_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(ids_of("x"))
    engine.kept = 1
    _, out, err = run(capsys, engine, "--prompt", "A", "--json")
    found = json.loads(out)
    assert found["kept_tokens"] == 1
    assert f", 1 of {len(found['prompt_token_ids'])} prompt tokens kept\n" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_says_cannot_command_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    said = " a\x1b[2Jb\tc\nd\x9b"
    _, out, _ = run(capsys, FakeEngine(ids_of(said)), "--prompt", "A")
    assert out == (" a[2Jb\tc\nd" if terminal else said) + "\n"


@pytest.mark.parametrize(("context", "line"), [("0", "--context must be 1"), ("2049", "for 2048 tokens, ask for 1 to 2048")])
def test_a_context_beyond_the_model_is_refused_before_it_is_loaded(
    capsys: pytest.CaptureFixture[str], context: str, line: str
) -> None:
    loader = Loader(FakeEngine(ids_of("x")))
    assert run_llama1b.main(["--prompt", "A", "--context", context], loader) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and line in captured.err and captured.err.count("\n") == 1
    assert loader.asked == {}


def test_a_checkpoint_is_opened_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gets what the tokenizer was found with: reading headers again takes time, and files may have changed."""
    from megakernel.loading import load_engine
    from models import checkpoint

    opened: list[object] = []
    read = checkpoint._read_headers

    def watched(directory: Path) -> Any:
        opened.append(directory)
        return read(directory)

    monkeypatch.setattr(checkpoint, "_read_headers", watched)
    argv = ["--prompt", "A", "--max-tokens", "1", "--backend", "vm", "--context", "40"]
    assert run_llama1b.main(argv, load_engine) == 0
    assert opened == [BUNDLED]
