"""Which model a run takes, how it is asked where nobody says, and how it is sampled where nobody says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

import models.smollm2
import run_llama1b
from megakernel.request import SamplingParams
from models.checkpoint import open_checkpoint
from models.weights import Weights
from scheduler.options import find_config
from tests.support import BUNDLED
from tests.support.cli_fakes import EOS, FakeEngine, Loader, ids_of
from tests.support.gguf_files import byte_level_keys, model_file


def as_gguf(path: Path, **keys: Any) -> Path:
    """The bundled model in GGUF, with its tokenizer and its template."""
    checkpoint = open_checkpoint(BUNDLED)
    tensors = Weights.collect(checkpoint.source, torch.float32).by_name
    tokenizer = byte_level_keys(json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8")), "gpt-2")
    template = json.loads((BUNDLED / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    template = template or (BUNDLED / "chat_template.jinja").read_text(encoding="utf-8")
    text = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": template}
    file = model_file(checkpoint.config, tensors, GGMLQuantizationType.BF16, {**tokenizer, **text})
    file.values |= {key.replace("__", "."): value for key, value in keys.items()}
    return file.write(path)


def directory_saying(folder: Path, generation: dict[str, Any]) -> Path:
    """The bundled model with a `generation_config.json` of its own."""
    for file in BUNDLED.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def asked(*argv: str) -> tuple[list[int], SamplingParams]:
    """The prompt's ids and the sampling that an engine is asked for."""
    loader = Loader(FakeEngine(ids_of("x")))
    assert run_llama1b.main(list(argv), loader) == 0
    assert loader.engine.started is not None
    prompt, _, sampling = loader.engine.started
    return prompt, sampling


@pytest.fixture
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts, with neither option nor variable."""
    monkeypatch.delenv("MEGAKERNEL_MODEL")


def chat_ids(text: str) -> list[int]:
    return [0, 3, *ids_of(text), EOS, 4]


def test_without_a_model_smollm2_is_asked_in_chat_form(
    nothing_named: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_gguf(tmp_path / "SmolLM2.gguf")
    monkeypatch.setattr(models.smollm2, "fetched", lambda: path)
    assert asked()[0] == chat_ids("What is the capital of France?")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "no --model: SmolLM2-135M-Instruct, license Apache-2.0"
    assert asked("--prompt", "A")[0] == chat_ids("A")
    assert asked("--prompt", "A", "--no-chat")[0] == [0, *ids_of("A")]


def test_without_a_network_the_bundled_one_goes_on(
    nothing_named: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable() -> Path:
        raise models.smollm2.Unreachable("pip says: no network")

    monkeypatch.setattr(models.smollm2, "fetched", unreachable)
    assert asked()[0] == [0, *ids_of("The garbage collector")]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("SmolLM2-135M-Instruct cannot be fetched (pip says: no network): going on with the small bundled model")
    assert lines[1].startswith(f"{BUNDLED} on vm, loaded in ")


@pytest.mark.parametrize("how", ["option", "variable", "bundled"])
def test_a_model_that_is_named_needs_no_network(
    how: str, nothing_named: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never() -> Path:
        raise AssertionError("fetched")

    monkeypatch.setattr(models.smollm2, "fetched", never)
    if how == "variable":
        monkeypatch.setenv("MEGAKERNEL_MODEL", str(BUNDLED))
    argv = {"option": ["--model", str(BUNDLED)], "variable": [], "bundled": ["--model", "bundled"]}[how]
    assert asked(*argv)[0] == [0, *ids_of("The garbage collector")]
    assert asked(*argv, "--chat", "--prompt", "A")[0] == chat_ids("A")


def test_bad_options_are_refused_before_anything_is_fetched(nothing_named: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.smollm2, "fetched", lambda: pytest.fail("fetched"))
    for argv in (["--model", ""], ["--prompt", ""], ["--top-p", "2"], ["--temperature", "-1"], ["--nonsense"]):
        assert run_llama1b.main(argv) == 2


SAYS: dict[str, tuple[dict[str, Any], list[str], dict[str, Any], str | None]] = {
    "nothing of sampling": ({"eos_token_id": 1}, [], {}, None),
    "to take the likeliest": ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, [], {}, None),
    "how to draw": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
        [],
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        "sampling: temperature 0.6, top-k 20, top-p 0.9 (by generation_config.json)",
    ),
    "to draw, and not how": (
        {"do_sample": True, "temperature": None, "top_k": None},
        [],
        {"temperature": 1.0},
        "sampling: temperature 1, top-k 0, top-p 1 (by generation_config.json)",
    ),
    "what an option overrides": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        ["--temperature", "0.2", "--top-k", "5"],
        {"temperature": 0.2, "top_p": 0.9, "top_k": 5},
        "sampling: temperature 0.2, top-k 5, top-p 0.9 (by generation_config.json)",
    ),
    "to draw, where the likeliest is wanted": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        ["--temperature", "0"],
        {"temperature": 0.0, "top_p": 0.9},
        "sampling: the likeliest token (by generation_config.json)",
    ),
    "what cannot be done here": (
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1, "min_p": 0.0},
        [],
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        "sampling: temperature 0.7, top-k 20, top-p 0.8 (by generation_config.json; without its repetition_penalty 1.1)",
    ),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_the_model_says_is_the_default(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation, argv, expected, line = SAYS[case]
    ends = {"eos_token_id": 1}
    model = directory_saying(tmp_path, ends | generation)
    assert asked("--model", str(model), "--prompt", "A", *argv)[1] == SamplingParams(**expected, stop_token_ids=(EOS,))
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sampling: ")]
    assert said == ([] if line is None else [line])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a word for yes": ({"do_sample": "yes"}, "do_sample is 'yes': it must be true or false"),
    "a temperature in words": ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot': it must be a number"),
    "half a token": ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5: it must be an integer"),
    "a negative temperature": ({"do_sample": True, "temperature": -1.0}, "temperature must be 0 or more"),
    "more than everything": ({"do_sample": True, "top_p": 1.5}, "top_p must lie in (0, 1]"),
    "no number": ({"do_sample": True, "top_p": float("nan")}, "top_p must lie in (0, 1], got nan"),
    "digits without end": ({"do_sample": True, "top_k": -(10**4000)}, "top_k must be 0 (off) or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_mean_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation, fragment = BAD[case]
    model = directory_saying(tmp_path, generation)
    assert run_llama1b.main(["--model", str(model), "--prompt", "A"], Loader(FakeEngine([]))) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "generation_config.json: " in line and fragment in line


def test_a_gguf_file_says_it_by_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_gguf(tmp_path / "m.gguf", general__sampling__temp=0.5, general__sampling__top_k=40, general__sampling__top_p=0.75)
    expected = SamplingParams(temperature=0.5, top_k=40, top_p=0.75, stop_token_ids=(EOS,))
    assert asked("--model", str(path), "--prompt", "A")[1] == expected
    assert "sampling: temperature 0.5, top-k 40, top-p 0.75 (by m.gguf)" in capsys.readouterr().err


def test_a_gguf_file_is_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a file, as the one file of a directory, without its suffix, and as the directory that it was made of: same tokens."""
    path = as_gguf(tmp_path / "bundled.gguf")
    other = tmp_path / "sha256-0123"
    other.symlink_to(path)
    texts = set()
    for model in (path, tmp_path, other, BUNDLED, BUNDLED / "model.safetensors"):
        argv = ["--model", str(model), "--prompt", "Return the", "--max-tokens", "4", "--backend", "vm", "--context", "16"]
        assert run_llama1b.main(argv) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and len(texts.pop()) > 4


def test_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run_llama1b.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 32


def test_commands_that_make_programs_take_one_too(tmp_path: Path) -> None:
    path = as_gguf(tmp_path / "bundled.gguf")
    assert find_config(str(path)) == find_config(str(BUNDLED / "model.safetensors")) == find_config(str(BUNDLED))
