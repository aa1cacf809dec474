"""Tokenizers out of GGUF files: token for token what transformers makes of the same file, and where we know better, what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.text import ModelText, codec_of
from models.checkpoint import open_checkpoint
from models.errors import UserError
from models.gguf.file import read_gguf
from models.gguf.tokenizer import SPLITS, tokenizer_files
from models.hf_config import parse_config
from models.random_weights import RandomWeights
from tests.support import BUNDLED, ROOT
from tests.support.configs import SMALL_CONFIGS
from tests.support.gguf_files import byte_level_keys, model_file

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXTS = [
    "Hello world",
    " leading",
    "  two leading",
    "trailing ",
    "trailing  ",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "a\n\nb",
    "a \n b",
    "a\r\nb\r\n",
    "\tindented\n\t\tmore",
    "don't they're I'LL we'Ve 'tis it's'",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-9",
    "x1y2z3 v2.0.1",
    "def f(x: int) -> list[str]:\n    return [str(x) for _ in range(10)]\n",
    "if (a && b || !c) { return a[0]->b; } // comment\n\n\n    }",
    "SELECT * FROM t WHERE a >= 'b';--",
    "https://example.org/a/b?c=d&e=f#g",
    "CamelCaseWORDSAndHTTPServer snake_case_words kebab-case-words",
    "naïve café résumé Ærøskøbing Straße",
    "cafe\u0301 e\u0301\u0302 \u212b",
    "Привет, мир! Γειά σου κόσμε",
    "日本語のテキストと中文文本和한국어",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "😀👍🏽👩‍👩‍👧‍👦🇩🇪 emoji",
    "a\u00a0b\u2003c\u3000d\u200be",
    "▁ a literal lower block ▁▁",
    "Ġ Ċ literal stand-ins",
    "½ ² ³ Ⅷ ٣ १२३ ①",
    "\u0000\u0001\x7f\x80\u009f",
    "\ufeffbom \ufffd replacement",
    "“quotes” ‘single’ – — … «guillemets»",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β",
    "<|end|> <|user|>\nhi<|assistant|>",
    "<s> </s> <unk> <0x0A> [INST] ok [/INST]",
    "a" * 300,
    " " * 100 + "x",
    "ab " * 50,
    "!!!???...,,,;;;",
    "(((([[[[{{{{",
    "…the end.\n\n\n   ",
]


def spm_keys() -> dict[str, Any]:
    """A SentencePiece-style vocabulary: marks, bytes, then pieces with falling scores, some of them alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    corpus = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "docs/kernel.md")]
    trained.train_from_iterator([*corpus, *TEXTS * 3], trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    vocabulary = trained.get_vocab()
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "[INST]", "[/INST]"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 4]
    scores = [0.0] * 259 + [-float(index // 2) for index in range(len(pieces))] + [-1000.0] * 2
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def bpe_keys(pre: str, **more: Any) -> dict[str, Any]:
    tokenizer = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    keys = byte_level_keys(tokenizer, pre)
    named = {"bos": 0, "eos": 1} | more.pop("ids", {})
    ids = {f"tokenizer.ggml.{name}_token_id": token for name, token in named.items()}
    flags = {f"tokenizer.ggml.{name}": value for name, value in more.items()}
    return {**keys, **ids, "tokenizer.chat_template": TEMPLATE, **flags}


def write(path: Path, keys: dict[str, Any], architecture: str = "llama") -> Path:
    """A small network with this tokenizer. Another architecture is one in its name alone: nothing but a tokenizer is read."""
    config = parse_config({**SMALL_CONFIGS["gqa2"], "model_type": "llama", "vocab_size": len(keys["tokenizer.ggml.tokens"])})
    tensors = dict(RandomWeights(config).tensors())
    file = model_file(config, tensors, GGMLQuantizationType.F16, keys)
    if architecture != "llama":
        file.values = {key.replace("llama.", f"{architecture}.", 1): value for key, value in file.values.items()}
        file.values["general.architecture"] = architecture
        file.values |= keys
    return file.write(path)


def ours(path: Path) -> ModelText:
    file = read_gguf(path)
    return ModelText.of_gguf(file, file.tensors["token_embd.weight"].shape[0])


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"bpe {pre}": ("llama", bpe_keys(pre, add_bos_token=False)) for pre in sorted(SPLITS)},
    "bpe with bos": ("llama", bpe_keys("llama-bpe", add_bos_token=True)),
    "bpe with bos and eos": ("llama", bpe_keys("qwen2", add_bos_token=True, add_eos_token=True)),
    "bpe of qwen2": ("qwen2", bpe_keys("qwen2", add_bos_token=False)),
    "bpe of qwen3": ("qwen3", bpe_keys("qwen2", add_bos_token=False)),
    "bpe of mistral": ("mistral", bpe_keys("tekken", add_bos_token=True)),
    "spm": ("llama", spm_keys()),
    "spm of mistral": ("mistral", spm_keys()),
    "spm without bos": ("llama", spm_keys() | {"tokenizer.ggml.add_bos_token": False}),
    "spm with eos": ("llama", spm_keys() | {"tokenizer.ggml.add_eos_token": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_token_for_token_with_transformers(case: str, tmp_path: Path) -> None:
    """Prompts, their text again, and a turn of chat."""
    architecture, keys = CASES[case]
    path = write(tmp_path / "model.gguf", keys, architecture)
    our, their = ours(path), theirs(path)
    for text in TEXTS:
        ids = our.encode(text)
        assert ids == their(text).input_ids, text
        decode = our.detokenizer([])
        streamed = "".join([*map(decode.step, ids), decode.finish()])
        assert streamed == their.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), text
    turn = [{"role": "user", "content": "What is\n a list? <|end|>"}]
    expected = their.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert our.encode_chat(turn[0]["content"]) == list(expected)


@pytest.fixture(scope="module", params=["bpe llama-bpe", "bpe qwen2", "bpe smollm", "bpe gpt-4o", "bpe tekken", "spm"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelText, Any]:
    architecture, keys = CASES[request.param]
    path = write(tmp_path_factory.mktemp("pair") / "model.gguf", keys, architecture)
    return ours(path), theirs(path)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(min_size=1, max_size=60)
    | st.text(alphabet="aB 1.\n\t'é日😀<|>/", min_size=1, max_size=60)
    | st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(" ".join)
)
def test_no_text_is_read_otherwise(pair: tuple[ModelText, Any], text: str) -> None:
    our, their = pair
    assert our.encode(text) == their(text).input_ids


def test_llama_3_begins_unless_the_file_says_no(tmp_path: Path) -> None:
    """Files that say nothing, as most of Llama 3's do: llama.cpp puts BOS in front, transformers does not."""
    path = write(tmp_path / "model.gguf", bpe_keys("llama-bpe"))
    assert ours(path).encode("a") == [0, *theirs(path)("a").input_ids]
    assert ours(write(path, bpe_keys("default"))).encode("a") == theirs(path)("a").input_ids


def test_minus_one_is_no_token(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", bpe_keys("default", ids={"bos": 2**32 - 1, "eot": 2**32 - 1}, add_bos_token=True))
    assert open_checkpoint(path).config.bos_token_id is None
    assert open_checkpoint(path).config.eos_token_ids == (1,)
    assert 0 not in ours(path).encode("a")


def test_a_prefix_that_the_file_does_not_want(tmp_path: Path) -> None:
    """`add_space_prefix`, which transformers does not hear."""
    keys = spm_keys() | {"tokenizer.ggml.add_bos_token": False}
    with_prefix, without = (
        ours(write(tmp_path / f"{wanted}.gguf", keys | {"tokenizer.ggml.add_space_prefix": wanted})) for wanted in (True, False)
    )
    assert without.encode(" the") == with_prefix.encode("the")
    assert without.encode("the") != with_prefix.encode("the")
    decode = without.detokenizer([])
    assert "".join([*map(decode.step, without.encode(" the")), decode.finish()]) == " the"


def test_a_mark_in_other_characters_is_one_token(tmp_path: Path) -> None:
    """As DeepSeek's distilled models have them; the characters of the mark stand for no bytes."""
    keys = bpe_keys("deepseek-r1-qwen", add_bos_token=True)
    place = len(keys["tokenizer.ggml.tokens"]) - 1
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"][:-1], "<｜begin▁of▁sentence｜>"]
    keys["tokenizer.ggml.merges"] = keys["tokenizer.ggml.merges"][:-1]  # it made the token that the mark replaces
    keys["tokenizer.ggml.token_type"][place] = 3
    keys["tokenizer.ggml.bos_token_id"] = place
    text = ours(write(tmp_path / "model.gguf", keys))
    assert text.encode("<｜begin▁of▁sentence｜>")[:2] == [place, place]
    assert text.encode_chat("a")[0] == place


def test_a_model_without_a_template(tmp_path: Path) -> None:
    keys = bpe_keys("default")
    del keys["tokenizer.chat_template"]
    path = write(tmp_path / "model.gguf", keys)
    with pytest.raises(UserError, match="model.gguf has no chat template: leave out --chat"):
        ours(path).encode_chat("a")


def test_a_template_that_refuses_names_the_file(tmp_path: Path) -> None:
    keys = bpe_keys("default") | {"tokenizer.chat_template": "{{ raise_exception('no') }}"}
    path = write(tmp_path / "model.gguf", keys)
    with pytest.raises(UserError, match="the chat template in .*model.gguf refuses this prompt: no"):
        ours(path).encode_chat("a")


def test_the_checkpoint_brings_its_codec(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", bpe_keys("default", add_bos_token=True))
    codec = codec_of(open_checkpoint(path))
    assert codec.encode("Return the") == codec_of(open_checkpoint(BUNDLED)).encode("Return the")


def test_the_files_are_those_of_a_directory(tmp_path: Path) -> None:
    files = tokenizer_files(read_gguf(write(tmp_path / "model.gguf", spm_keys())).values, 10**6)
    assert json.loads(files.tokenizer)["model"]["byte_fallback"] is True
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert files.chat_template == TEMPLATE
