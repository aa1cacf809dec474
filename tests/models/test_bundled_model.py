"""The bundled model: small, whole, readable by transformers, and writing English; and the program that makes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models import bundled_corpus, train_bundled
from models.bundled_corpus import ASSISTANT, BEGIN, END, SPECIAL_TOKENS, USER
from models.bundled_format import ARCHITECTURE
from models.hf_config import read_config
from models.weights import parameter_count

BUNDLED = Path(bundled_corpus.__file__).parent / "bundled"
PROMPTS = ("The with statement", "Return the", "This module", "If the object is", "Raise an exception if")


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(BUNDLED, output_loading_info=True)
    loaded, report = found
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED)


def test_it_is_at_most_ten_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 10_000_000


def test_transformers_loads_it_as_it_is_described(model: Any) -> None:
    assert model.dtype == torch.bfloat16
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "tie_word_embeddings", "eos_token_id"):
        assert getattr(model.config, name) == ARCHITECTURE[name]
    ours = read_config(BUNDLED)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(ours)
    assert (ours.bos_token_id, ours.eos_token_ids) == (0, (1,))


def test_the_tokenizer_keeps_any_text(tokenizer: Any) -> None:
    text = "".join(map(chr, range(1, 0x250))) + " naïve 日本語 😀 a\t\n  b"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == ARCHITECTURE["bos_token_id"]
    assert tokenizer.decode(ids[1:]) == text
    assert max(ids) < ARCHITECTURE["vocab_size"] == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]


def test_greedy_output_reads_as_english(model: Any, tokenizer: Any) -> None:
    """Nine words in ten are words of the language reference; noise of 2048 tokens would make one in four or so."""
    from pydoc_data.topics import topics

    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    written: list[str] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
        written += re.findall(r"[a-z]+", tokenizer.decode(out, skip_special_tokens=True).lower())
    assert len(written) >= 30
    assert sum(word in known for word in written) >= 0.9 * len(written), written


def test_cleaning_takes_sessions_rules_and_special_tokens_out() -> None:
    raw = f"Title\n    =========\n\n    Text {BEGIN}here.\n\n    >>> f(1)\n    2\n\n\n\n    More\x07 text.  \n"
    assert bundled_corpus.clean(raw) == "Title\n\nText here.\n\nMore text."


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("Every record once, in an order that depends on this version alone.", True),
        ("if x[i] == y[j] and not (a or b): z += foo(bar=1) | mask[0x10]", False),
        ("too short", False),
    ],
)
def test_prose_is_told_from_code(text: str, prose: bool) -> None:
    assert bundled_corpus.is_prose(text) == prose


def test_records_of_a_module(tmp_path: Path) -> None:
    """A docstring under its signature, with its conversation; a long comment; nothing of the code."""
    comment = "A comment about how the following works, which goes on\n# for long enough to be worth reading by anybody at all."
    meaning = "Return the sum of both numbers that the caller gave."
    source = f'def f(a, *, b=1):\n    """{meaning}"""\n    # {comment}\n    return a + b\n'
    path = tmp_path / "mod.py"
    path.write_text(source.replace("\n# for", "\n    # for"))
    doc, note = bundled_corpus._module("mod", path)
    assert doc == ("mod.f(a, *, b=1)", meaning)
    assert note == ("", comment.replace("\n# ", "\n"))
    question, answer = bundled_corpus._conversation(*doc).split(f"{END}{ASSISTANT}")
    assert question.startswith(f"{BEGIN}{USER}")
    assert "mod.f" in question
    assert answer == f"{meaning}{END}"


def test_training_learns_and_writes_a_model_that_loads(tmp_path: Path) -> None:
    """A few steps on a small corpus, start to end: the loss falls below that of equal odds, ln 2048 = 7.6."""
    documents = [f"{BEGIN}Return the number {n} as a string, or raise an error if there is none.{END}" for n in range(400)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(bundled_corpus.RECORD_SEPARATOR.join(["3.0", *documents]), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--corpus", str(corpus), "--tokenizer", str(BUNDLED / "tokenizer.json"), "--out", str(out), "--device", "cpu"]
    train_bundled.main([*arguments, "--steps", "12", "--batch", "2", "--context", "32", "--evaluate-every", "12"])
    card = (out / "README.md").read_text()
    loss = float(re.search(r"([\d.]+) nats a token", card)[1])  # type: ignore[index]
    assert loss < 7.0
    assert "CPython 3.0" in card
    assert json.loads((out / "config.json").read_text()) == json.loads((BUNDLED / "config.json").read_text())
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in BUNDLED.iterdir())
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == ARCHITECTURE["hidden_size"]
