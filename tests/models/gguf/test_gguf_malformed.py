"""Everything that can be wrong with a GGUF file: one line that names the file and the fault, at once, in little memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from megakernel.text import codec_of
from models.checkpoint import open_checkpoint
from models.errors import UserError
from models.gguf import header
from models.hf_config import parse_config
from models.packed import pack
from models.random_weights import RandomWeights
from models.sampling_defaults import of_gguf
from tests.models.gguf.test_gguf_tokenizer import bpe_keys, spm_keys
from tests.support.configs import SMALL_CONFIGS
from tests.support.gguf_files import File, Raw, Stored, model_file, text

SOON, LITTLE = 5.0, 2**25  # seconds and bytes: each takes some milliseconds and a megabyte
NORM, MATRIX, EMBEDDING = "output_norm.weight", "blk.1.ffn_down.weight", "token_embd.weight"
ROW = 128  # of MATRIX: four blocks of 32, no whole one of 256

_SOUND: dict[str, File] = {}


def sound(tokenizer: str = "bpe") -> File:
    """A file to be damaged: two layers, a tied head, Q8_0 where rows allow it."""
    if tokenizer not in _SOUND:
        keys = bpe_keys("default") if tokenizer == "bpe" else spm_keys()
        size = len(keys["tokenizer.ggml.tokens"])
        config = parse_config({**SMALL_CONFIGS["gqa2"], "model_type": "llama", "vocab_size": size, "bos_token_id": 0})
        tensors = dict(RandomWeights(config, dtype=torch.float32).tensors())
        _SOUND[tokenizer] = model_file(config, tensors, GGMLQuantizationType.Q8_0, keys)
    file = _SOUND[tokenizer]
    return File(dict(file.values), {name: Stored(**vars(stored)) for name, stored in file.tensors.items()})


def read_whole(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    codec_of(checkpoint)
    pack(checkpoint.source, checkpoint.config)


def complaint(path: Path) -> str:
    """The line that refuses a file, which takes neither time nor memory."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(UserError) as caught:
            read_whole(path)
        assert time.perf_counter() - began < SOON
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 2200
    return line


def test_the_undamaged_files_are_sound(tmp_path: Path) -> None:
    for tokenizer in ("bpe", "spm"):
        read_whole(sound(tokenizer).write(tmp_path / "model.gguf"))


def key(name: str, value: Any) -> Callable[[File], None]:
    return lambda file: file.values.update({name: value})


def without(name: str) -> Callable[[File], None]:
    return lambda file: file.values.__delitem__(name)


def tensor(name: str, **changes: Any) -> Callable[[File], None]:
    def change(file: File) -> None:
        for field, value in changes.items():
            setattr(file.tensors[name], field, value)

    return change


def whole(**changes: Any) -> Callable[[File], None]:
    def change(file: File) -> None:
        for field, value in changes.items():
            setattr(file, field, value)

    return change


def listed(kind: int, count: int, content: bytes = b"") -> Raw:
    """A list that says how long it is, and may lie."""
    return Raw(struct.pack("<IIQ", GGUFValueType.ARRAY, kind, count) + content)


def scales(value: float) -> Callable[[File], None]:
    """The scale of a block in the middle of a matrix."""

    def change(file: File) -> None:
        raw = bytearray(file.tensors[MATRIX].data)
        raw[340:342] = np.float16(value).tobytes()  # blocks of 34 bytes
        file.tensors[MATRIX].data = bytes(raw)

    return change


def tokens(change: Callable[[list[Any]], object], name: str = "tokens") -> Callable[[File], None]:
    def damage(file: File) -> None:
        copy = list(file.values[f"tokenizer.ggml.{name}"])
        change(copy)
        file.values[f"tokenizer.ggml.{name}"] = copy

    return damage


HEADERS: dict[str, tuple[Callable[[File], None], str]] = {
    "another magic": (whole(magic=b"GGML"), "does not begin as a GGUF file does"),
    "version 1": (whole(version=1), "GGUF version 1 is not supported"),
    "a version to come": (whole(version=4), "GGUF version 4 is not supported"),
    "big-endian": (whole(version=3 << 24), "is big-endian"),
    "2^63 tensors": (whole(counts=(2**63, 20)), f"says that it holds {2**63} tensors"),
    "2^64 - 1 keys": (whole(counts=(3, 2**64 - 1)), f"says that it holds {2**64 - 1} keys"),
    "more keys than there are": (whole(counts=(21, 4000)), "damaged"),
    "more tensors than there are": (whole(counts=(60000, 20)), "damaged"),
    "fewer keys than there are": (whole(counts=(21, 3)), "damaged"),
    "a key without an end": (key("x", Raw(struct.pack("<IQ", GGUFValueType.STRING, 2**62))), "x is a text of"),
    "a text longer than the file": (key("x", Raw(struct.pack("<IQ", GGUFValueType.STRING, 2**20))), "ends within x"),
    "a key that is not UTF-8": (lambda file: file.values.update({b"\xff\xfe": 1}), "a key is not valid UTF-8"),  # type: ignore[dict-item]
    "a text that is not UTF-8": (key("general.name", b"\xc3("), "general.name is not valid UTF-8"),
    "a type that does not exist": (key("x", Raw(struct.pack("<II", 13, 0))), "key x has type 13, which does not exist"),
    "a list of a type that does not exist": (key("x", listed(99, 1)), "key x has type 99"),
    "a list of 2^60 numbers": (key("x", listed(GGUFValueType.UINT64, 2**60)), f"key x is a list of {2**60}"),
    "a list longer than the file": (key("x", listed(GGUFValueType.UINT64, 2**20)), "ends within x"),
    "a list of texts longer than the file": (key("x", listed(GGUFValueType.STRING, 2**21 - 10**4)), "x is a text of"),
    "a list of lists": (key("x", listed(GGUFValueType.ARRAY, 2, b"\0" * 24)), "key x is a list of lists"),
    "a flag that is 2": (key("x", Raw(struct.pack("<IB", GGUFValueType.BOOL, 2))), "key x is 2: neither true nor false"),
    "an alignment of 0": (key("general.alignment", 0), "general.alignment is 0"),
    "an alignment of 48": (key("general.alignment", 48), "general.alignment is 48: it must be a power of two"),
    "an alignment of 2^31": (key("general.alignment", 2**31), "general.alignment is"),
    "an alignment in words": (key("general.alignment", "32"), "general.alignment is '32'"),
    "no dimensions": (tensor(NORM, shape=()), f"tensor {NORM} has 0 dimensions"),
    "nine dimensions": (tensor(NORM, shape=(1,) * 9), f"tensor {NORM} has 9 dimensions"),
    "a dimension of 0": (tensor(NORM, shape=(0,)), f"tensor {NORM} has shape [0]"),
    "dimensions whose product overflows": (tensor(NORM, shape=(2**32, 2**32)), f"tensor {NORM} has shape"),
    "rows of half a block": (tensor(MATRIX, shape=(64, 100)), f"tensor {MATRIX} has rows of 100, no multiple of the 32"),
    "rows too short for Q6_K": (tensor(MATRIX, kind=14), f"tensor {MATRIX} has rows of {ROW}, no multiple of the 256"),
    "a type of tensor that does not exist": (tensor(NORM, kind=999), f"tensor {NORM} has type 999, which is not known"),
    "a tensor beyond the end": (tensor(NORM, start=2**40), f"cut off within tensor {NORM}"),
    "a tensor at 2^64 - 32": (tensor(NORM, start=2**64 - 32), f"cut off within tensor {NORM}"),
    "a tensor out of step": (tensor(NORM, start=2**30 + 4), f"tensor {NORM} starts at byte"),
    "a tensor upon another": (tensor(NORM, start=0), ", within "),
    "a name without an end": (
        lambda file: file.tensors.update({"n" * 300: file.tensors[NORM]}),
        "a tensor's name is a text of 300",
    ),
}
MODELS: dict[str, tuple[Callable[[File], None], str]] = {
    "no architecture": (without("general.architecture"), "general.architecture is missing"),
    "an architecture that is a number": (key("general.architecture", 3), "architecture 3 is not supported"),
    "a picture's encoder": (key("general.architecture", "clip"), "architecture 'clip' is not supported: use a model of llama"),
    "an architecture to come": (key("general.architecture", "gemma3"), "architecture 'gemma3' is not supported"),
    "no sizes": (without("llama.embedding_length"), "llama.embedding_length is missing"),
    "a size in words": (key("llama.block_count", "two"), "llama.block_count is 'two': it must be an integer"),
    "a size that is a list": (key("llama.block_count", np.ones(2, np.int32)), "llama.block_count is a list"),
    "no heads": (key("llama.attention.head_count", 0), "must be an integer of at least 1"),
    "layers without end": (key("llama.block_count", 2**32 - 1), "is not supported"),
    "layers that differ": (key("llama.feed_forward_length", np.array([128, 64], np.int32)), "differs between layers"),
    "an epsilon that is no number": (key("llama.attention.layer_norm_rms_epsilon", float("nan")), "rms_eps is nan"),
    "an infinite theta": (key("llama.rope.freq_base", float("inf")), "rope_theta is inf"),
    "values of another length": (
        key("llama.attention.value_length", 32),
        "llama.attention.value_length is not the key's length",
    ),
    "RoPE on half of each head": (key("llama.rope.dimension_count", 8), "partial_rotary_factor"),
    "a scaling of RoPE that we lack": (key("llama.rope.scaling.type", "longrope"), "rope type 'longrope' is not supported"),
    "a scaling that is a number": (key("llama.rope.scaling.type", 3), "llama.rope.scaling.type is 3: it must be a text"),
    "experts": (key("llama.expert_count", 8), "num_local_experts"),
    "an end token in words": (key("tokenizer.ggml.eos_token_id", "end"), "tokenizer.ggml.eos_token_id is 'end'"),
    "no embedding": (lambda file: file.tensors.__delitem__(EMBEDDING), f"tensor {EMBEDDING} is missing"),
    "a tensor too few": (lambda file: file.tensors.__delitem__(NORM), "tensor model.norm.weight is missing"),
    "a tensor too many": (
        lambda file: file.tensors.update({"blk.7.attn_q.weight": file.tensors["blk.1.attn_q.weight"]}),
        "tensor blk.7.attn_q.weight is left over",
    ),
    "a tensor of experts": (
        lambda file: file.tensors.update({"blk.0.ffn_gate_exps.weight": file.tensors[NORM]}),
        "tensor blk.0.ffn_gate_exps.weight is left over",
    ),
    "a matrix turned over": (
        tensor(MATRIX, shape=(128, 64)),
        f"tensor {MATRIX} has shape [128, 64], but its keys make it [64, 128]",
    ),
    "a norm of two dimensions": (tensor(NORM, shape=(1, 64)), f"tensor {NORM} has shape [1, 64]"),
    "IQ4_NL": (tensor(MATRIX, kind=20), f"tensor {MATRIX} is IQ4_NL, which is not supported: take a file in F32, F16"),
    "MXFP4": (tensor(MATRIX, kind=39), f"tensor {MATRIX} is MXFP4, which is not supported"),
    "whole numbers": (tensor(NORM, kind=26), f"tensor {NORM} is I32, which is not supported"),
    "a scale that is no number": (scales(float("nan")), "tensor model.layers.1.mlp.down_proj.weight holds nan"),
    "an infinite scale": (scales(float("inf")), "tensor model.layers.1.mlp.down_proj.weight holds"),
    "a norm that is no number": (
        tensor(NORM, data=np.full(64, np.nan, np.float32).tobytes()),
        "tensor model.norm.weight holds nan",
    ),
    "factors of another length": (
        lambda file: file.tensors.update({"rope_freqs.weight": Stored(b"\0" * 12, (3,), 0)}),
        "rope_freqs.weight has shape [3], heads of 16 need [8]",
    ),
    "factors of a strange kind": (
        lambda file: file.tensors.update({"rope_freqs.weight": Stored(b"\0" * 32, (8,), 0)}),
        "rope_freqs.weight holds factors that are not those of Llama 3's scaling",
    ),
    "factors beside a scaling": (
        lambda file: (
            file.tensors.update({"rope_freqs.weight": Stored(b"\0" * 32, (8,), 0)})
            or file.values.update({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
        ),
        "rope_freqs.weight stands beside llama.rope.scaling.type 'linear'",
    ),
    "factors without end": (
        lambda file: file.tensors.update({"rope_freqs.weight": Stored(b"\0" * 2**20, (2**18,), 0)}),
        "rope_freqs.weight has shape [262144], which no head needs",
    ),
    "a part that is not named so": (
        key("split.count", 2),
        "is part 1 of 2, but not named so: call it <name>-00001-of-00002.gguf",
    ),
    "a part beyond the last": (
        lambda file: file.values.update({"split.no": 5, "split.count": 2}),
        "split.no is 5 of split.count 2",
    ),
    "parts without end": (key("split.count", 65535), "of split.count 65535"),
    "a temperature in words": (
        key("general.sampling.temp", "hot"),
        "general.sampling.temperature is 'hot': it must be a number",
    ),
}
TOKENIZERS: dict[str, tuple[str, Callable[[File], None], str]] = {
    "no tokenizer": ("bpe", without("tokenizer.ggml.model"), "tokenizer.ggml.model is missing: the file has no tokenizer"),
    "a tokenizer of words": ("bpe", key("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model 'bert' is not supported"),
    "a split that is not known": ("bpe", key("tokenizer.ggml.pre", "new-bpe"), "tokenizer.ggml.pre 'new-bpe' is not supported"),
    "no tokens": ("bpe", without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens is missing"),
    "tokens that are numbers": ("bpe", key("tokenizer.ggml.tokens", np.arange(9)), "tokenizer.ggml.tokens is no list of texts"),
    "an empty list of tokens": ("bpe", key("tokenizer.ggml.tokens", []), "tokenizer.ggml.tokens is no list of texts"),
    "more tokens than rows": ("bpe", tokens(lambda old: old.append("new")), "tokens, but the embedding has"),
    "a token that stands twice": (
        "bpe",
        tokens(lambda old: old.__setitem__(500, old[400])),
        "twice: take the file from a sound model",
    ),
    "a token that is not UTF-8": (
        "bpe",
        tokens(lambda old: old.__setitem__(5, b"\xff")),
        "tokenizer.ggml.tokens is not valid UTF-8",
    ),
    "no merges": ("bpe", without("tokenizer.ggml.merges"), "tokenizer.ggml.merges is missing"),
    "a merge of one": (
        "bpe",
        tokens(lambda old: old.__setitem__(3, "th"), "merges"),
        "tokenizer.ggml.merges[3], 'th', does not join",
    ),
    "a merge of three": ("bpe", tokens(lambda old: old.__setitem__(3, "t h e"), "merges"), "tokenizer.ggml.merges[3], 't h e'"),
    "a merge to no token": ("bpe", tokens(lambda old: old.__setitem__(3, "q q"), "merges"), "tokenizer.ggml.merges[3], 'q q'"),
    "merges that are numbers": ("bpe", key("tokenizer.ggml.merges", np.arange(3)), "tokenizer.ggml.merges is no list of texts"),
    "too few types": ("bpe", key("tokenizer.ggml.token_type", np.ones(3, np.int32)), "tokenizer.ggml.token_type is no list of"),
    "types that are texts": ("bpe", key("tokenizer.ggml.token_type", ["a"]), "tokenizer.ggml.token_type is no list of"),
    "BOS beyond the tokens": ("bpe", key("tokenizer.ggml.bos_token_id", 10**6), "tokenizer.ggml.bos_token_id is 1000000"),
    "a flag in words": ("bpe", key("tokenizer.ggml.add_bos_token", "yes"), "tokenizer.ggml.add_bos_token is 'yes'"),
    "a template that is a number": (
        "bpe",
        key("tokenizer.chat_template", 5),
        "tokenizer.chat_template is 5: it must be a text",
    ),
    "no scores": ("spm", without("tokenizer.ggml.scores"), "tokenizer.ggml.scores is missing"),
    "too few scores": ("spm", key("tokenizer.ggml.scores", np.ones(3, np.float32)), "tokenizer.ggml.scores is no list of"),
    "scores that are no numbers": (
        "spm",
        lambda file: file.values.update({"tokenizer.ggml.scores": file.values["tokenizer.ggml.scores"] * np.float32("nan")}),
        "tokenizer.ggml.scores holds what is no finite number",
    ),
    "a token without end": ("spm", tokens(lambda old: old.__setitem__(300, "a" * 10**5)), "a token of 100000 characters"),
}


@pytest.mark.parametrize("case", [*HEADERS, *MODELS])
def test_a_damaged_file_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    damage, fragment = (HEADERS | MODELS)[case]
    file = sound()
    damage(file)
    path = tmp_path / "model.gguf"
    line = complaint(file.write(path))
    assert fragment in line
    assert line.startswith(f"{path}: ") or line.startswith("tensor model."), "what is found while packing names the tensor"


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    tokenizer, damage, fragment = TOKENIZERS[case]
    file = sound(tokenizer)
    damage(file)
    path = file.write(tmp_path / "model.gguf")
    line = complaint(path)
    assert line.startswith(f"{path}: ") and fragment in line


def test_names_that_stand_twice(tmp_path: Path) -> None:
    path = sound().write(tmp_path / "model.gguf")
    content = path.read_bytes()
    for old, new, fragment in (
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", "tensor blk.0.attn_q.weight stands twice"),
        (b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id", "key tokenizer.ggml.eos_token_id stands twice"),
    ):
        path.write_bytes(content.replace(text(old), text(new)))
        assert fragment in complaint(path)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "no such"),
    "empty": (Path.touch, "ends within its first bytes"),
    "four bytes": (lambda path: path.write_bytes(b"GGUF"), "ends within its first bytes"),
    "a page of the web": (lambda path: path.write_text("<html>" * 50), "does not begin as a GGUF file does"),
    "a pointer of Git": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "does not begin as"),
    "zeros": (lambda path: path.write_bytes(bytes(10**5)), "does not begin as"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_file(kind: str, tmp_path: Path) -> None:
    make, fragment = KINDS[kind]
    path = tmp_path / "model.gguf"
    make(path)
    assert fragment in complaint(path)


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    file = sound()
    path = file.write(tmp_path / "model.gguf")
    content, stop = path.read_bytes(), len(file.header())
    for length in [
        *range(0, 200, 7),
        *range(200, stop, stop // 40),
        stop,
        *range(stop + 1, len(content) - 32, len(content) // 20),
    ]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="ends within|cut off within") as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_header_of_texts_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "HEADER_BYTES", 2**20)
    file = sound()
    file.values |= {f"x{index}": "y" * 2**17 for index in range(9)}
    assert "has a header of more than 1048576 bytes" in complaint(file.write(tmp_path / "model.gguf"))


def test_the_worst_vocabulary_takes_a_bounded_time(tmp_path: Path) -> None:
    """As many tokens of the longest kind as 4 MB hold, each of whose halves are tokens."""
    file = sound("spm")
    pieces = ["a" * length for length in range(1, 257)] + ["b" + "a" * (index % 200) + str(index) for index in range(20000)]
    count = len(pieces)
    keys = {"tokens": pieces, "scores": np.zeros(count, np.float32), "token_type": np.ones(count, np.int32)}
    file.values |= {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    path = file.write(tmp_path / "model.gguf")
    began = time.perf_counter()
    with pytest.raises(UserError, match="tokens, but the embedding has"):
        codec_of(open_checkpoint(path))
    assert time.perf_counter() - began < SOON


def test_a_bad_number_of_sampling_names_the_key() -> None:
    with pytest.raises(UserError, match="a.gguf: general.sampling.top_k is 'x': it must be an integer"):
        of_gguf(Path("a.gguf"), {"general.sampling.temp": 1.0, "general.sampling.top_k": "x"})


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 2**16), content=st.binary(min_size=1, max_size=16))
def test_no_bytes_in_a_header_end_otherwise(place: int, content: bytes) -> None:
    """Read, or refused in a line; never another exception."""
    file = sound()
    with TemporaryDirectory() as directory:
        path = file.write(Path(directory) / "model.gguf")
        place %= len(file.header())
        with open(path, "r+b") as opened:
            opened.seek(place)
            opened.write(content)
        try:
            read_whole(path)
        except UserError as error:
            assert str(error).isprintable()


VALUES = (
    st.integers(0, 2**32 - 1)
    | st.floats(width=32)
    | st.booleans()
    | st.text(max_size=9)
    | st.lists(st.text(max_size=3), max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(sound().values)), value=VALUES)
def test_no_value_of_a_key_ends_otherwise(name: str, value: Any) -> None:
    file = sound()
    file.values[name] = value
    with TemporaryDirectory() as directory:
        path = file.write(Path(directory) / "model.gguf")
        try:
            read_whole(path)
        except UserError as error:
            assert str(error).isprintable()
