"""Files that would block, never end, fill the memory, or write to the terminal: one line, at once."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models.checkpoint
import models.packing
import models.rope
import models.safetensors_file
from models.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from models.config import ModelConfig, RopeScaling
from models.errors import UserError, printable, quoted
from models.files import JSON_BYTES, read_json_object
from models.hf_config import parse_config, read_config
from models.packed import pack
from models.safetensors_header import HEADER_LIMIT
from models.weights import EMBEDDING, HEAD
from tests.support.damage import FIRST, VALUES, edit_header, refused, rewrite, write_shards, write_single

NORM, MATRIX = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
SOON = 5.0  # seconds; each takes some milliseconds, where it once took minutes or never ended


def a_socket(path: Path) -> None:
    """Bound by a short name: that of a test's directory may be longer than a socket's can be."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a pipe"),
    "directory": (Path.mkdir, "a directory"),
    "link to a device that never ends": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "link to the terminal": (lambda path: path.symlink_to("/dev/tty"), "a device"),
    "socket": (a_socket, "a socket"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", SINGLE_FILE, INDEX_FILE, FIRST])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_is_not_opened(kind: str, file: str, tmp_path: Path) -> None:
    (write_single if file == SINGLE_FILE else write_shards)(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    make, words = NOT_FILES[kind]
    make(tmp_path / file)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / file}: ") and words in message


def test_a_pipe_that_took_the_place_of_a_file_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening."""
    (tmp_path / "sound.json").write_text("{}")
    os.mkfifo(tmp_path / "config.json")
    status = os.stat(tmp_path / "sound.json")
    with monkeypatch.context() as patch:
        patch.setattr("models.files.os.stat", lambda _: status)
        with pytest.raises(UserError, match="config.json"):
            read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_no_more_is_read_than_such_a_file_can_need(file: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    os.truncate(tmp_path / file, 2**40)  # takes no room on the disk
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / file}: more than {JSON_BYTES} bytes")


def test_a_header_longer_than_any_is_not_read(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", HEADER_LIMIT + 1))
    os.truncate(tmp_path / SINGLE_FILE, 2 * HEADER_LIMIT)
    assert f"header of {HEADER_LIMIT + 1} bytes" in refused(tmp_path)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_that_json_still_reads(opening: str, tmp_path: Path) -> None:
    """What is printed or compared of it later would sink."""
    closing = "]" if opening == "[" else "}"
    write_single(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ' + opening * 200 + "1" + closing * 200 + "}")
    assert "nested more than 100 deep" in refused(tmp_path)


def test_integers_of_thousands_of_digits(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")
    assert "not valid JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"shape": [10**1500] * 4}, {"shape": [2**62] * 5000}, {"shape": [2**63, 1]}, {"data_offsets": [0, 10**4000]}],
    ids=["long numbers", "many dimensions", "more than 63 bits", "a long offset"],
)
def test_shapes_too_long_to_multiply_or_print(change: dict[str, Any], tmp_path: Path) -> None:
    write_single(tmp_path)
    edit_header(tmp_path / SINGLE_FILE, lambda header: header[NORM].update(change))
    message = refused(tmp_path)
    assert NORM in message and "bad header entry" in message


def test_the_largest_shape_that_is_still_multiplied(tmp_path: Path) -> None:
    write_single(tmp_path)
    edit_header(tmp_path / SINGLE_FILE, lambda header: header[NORM].update(shape=[2**63 - 1] * 64))
    assert f"tensor {NORM} has offsets" in refused(tmp_path)


def test_a_header_of_60000_names_is_read_in_one_go(tmp_path: Path) -> None:
    """One name stands twice, at the very end: to find it took a look at every name for every name."""
    write_single(tmp_path)
    names = ", ".join(f'"spare.{i}.rotary_emb.inv_freq": 0' for i in range(60_000))
    edit_header(tmp_path / SINGLE_FILE, lambda _: f'{{{names}, "twice": 0, "twice": 0}}')
    started = time.process_time()
    assert "twice stands twice" in refused(tmp_path)
    assert time.process_time() - started < SOON


def test_a_header_is_not_read_anew_for_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many readings as tensors, each as long as there are tensors, made loading quadratic."""
    write_single(tmp_path)
    source = open_checkpoint(tmp_path).source
    opened: list[Path] = []
    real = models.checkpoint.open_file

    def counted(path: Path) -> Any:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(models.checkpoint, "open_file", counted)
    largest = max(tensor.nbytes for _, tensor in source.tensors())
    assert len(opened) == 1
    monkeypatch.setattr(models.checkpoint, "MAPPED_BYTES", largest)
    opened.clear()
    assert len(dict(source.tensors())) == 20
    assert len(opened) > 1, "and what was read leaves memory now and then"


def test_a_tensor_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    """The file is another, and sound, since it was checked."""
    write_single(tmp_path)
    source = open_checkpoint(tmp_path).source
    rewrite(tmp_path / SINGLE_FILE, lambda tensors: tensors.pop(NORM))
    with pytest.raises(UserError, match=f"{SINGLE_FILE}: tensor {NORM} cannot be read"):
        list(source.tensors())


def test_a_file_that_memory_cannot_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch has it: with a RuntimeError, of some files that take no room on the disk and terabytes of addresses."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 8796636185997 bytes: Cannot allocate memory (12)")

    write_single(tmp_path)
    monkeypatch.setattr(models.safetensors_file, "safe_open", fail)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / SINGLE_FILE}: cannot be opened") and "unable to mmap" in message


@pytest.mark.parametrize("elements", [1, 640, 2**23])
def test_a_tied_head_is_compared_some_elements_at_a_time(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not some rows, which may be of any width."""
    monkeypatch.setattr(models.checkpoint, "COMPARED_ELEMENTS", elements)
    write_single(tmp_path)
    rewrite(tmp_path / SINGLE_FILE, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    open_checkpoint(tmp_path)
    rewrite(tmp_path / SINGLE_FILE, lambda tensors: tensors[HEAD][-1, -1].add_(1))
    assert f"{HEAD} differs from {EMBEDDING}" in refused(tmp_path)


VALUES_THAT_ARE_NONE = {
    "NaN": (math.nan, torch.bfloat16, "nan"),
    "negative NaN": (-math.nan, torch.bfloat16, "nan"),
    "infinity": (math.inf, torch.float16, "inf"),
    "minus infinity": (-math.inf, torch.float32, "-inf"),
}


@pytest.mark.parametrize("packed", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [NORM, MATRIX])
@pytest.mark.parametrize("case", VALUES_THAT_ARE_NONE)
def test_weights_that_are_no_numbers(case: str, name: str, packed: torch.dtype, tmp_path: Path) -> None:
    value, dtype, shown = VALUES_THAT_ARE_NONE[case]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    write_single(tmp_path)
    rewrite(tmp_path / SINGLE_FILE, spoil)
    checkpoint = open_checkpoint(tmp_path)
    place = [63] if name == NORM else [63, 127]
    with pytest.raises(UserError) as caught:
        pack(checkpoint.source, checkpoint.config, packed)
    assert str(caught.value).startswith(f"tensor {name} holds {shown} at {place}: weights must be finite")


def test_a_bias_that_is_no_number(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.k_proj.bias"
    write_single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, "attention_bias": True}))
    sizes = read_config(tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(sizes.num_layers):
            for part, heads in (("q", sizes.num_heads), ("k", sizes.num_kv_heads), ("v", sizes.num_kv_heads)):
                tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.zeros(heads * sizes.head_dim)
            tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(sizes.hidden_size)
        tensors[bias][3] = math.nan

    rewrite(tmp_path / SINGLE_FILE, add)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=rf"tensor {bias} holds nan at \[3\]"):
        pack(checkpoint.source, checkpoint.config)


def test_weights_that_the_packed_type_does_not_hold(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MATRIX] = tensors[MATRIX].float()
        tensors[MATRIX][1, 2] = -3.4e38

    write_single(tmp_path)
    rewrite(tmp_path / SINGLE_FILE, spoil)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=rf"tensor {MATRIX} holds -3.4e\+38 at \[1, 2\], too large for bfloat16"):
        pack(checkpoint.source, checkpoint.config)
    assert pack(checkpoint.source, checkpoint.config, torch.float32).weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_largest_numbers_of_a_type_are_numbers(dtype: torch.dtype) -> None:
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0], dtype=dtype)
    models.packing.check_finite("weight", extremes, extremes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e-324},
        {"rope_theta": 1e39},
        {"rope_theta": 1e-30, "rope_scaling": {"rope_type": "linear", "factor": 1e-12}},
        {"rms_norm_eps": 1e-46},
        {"rms_norm_eps": 1e300},
        {"rope_scaling": {"rope_type": "linear", "factor": 5e-324}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.2e-38}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1e300}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 10**400,
            }
        },
    ],
    ids=str,
)
def test_numbers_that_fp32_does_not_hold(changes: dict[str, Any], tmp_path: Path) -> None:
    write_single(tmp_path, {**VALUES, **changes})
    assert refused(tmp_path).startswith(f"{tmp_path / 'config.json'}: ")


@settings(max_examples=300, deadline=None)
@given(
    theta=st.floats(0, allow_nan=False, exclude_min=True),
    factor=st.floats(0, allow_nan=False, exclude_min=True),
    low=st.floats(0, allow_nan=False, exclude_min=True),
    high=st.floats(0, allow_nan=False, exclude_min=True),
    kind=st.sampled_from(["default", "linear", "llama3"]),
    original=st.integers(1, 2**24),
)
def test_a_table_that_is_made_holds_numbers(
    theta: float, factor: float, low: float, high: float, kind: str, original: int
) -> None:
    try:
        config = ModelConfig(
            64, 32, 2, 4, 2, 16, 50, rope_theta=theta, rope_scaling=RopeScaling(kind, factor, low, high, original)
        )
        table = models.rope.rope_table(config, 5)
    except UserError:
        return
    assert table.isfinite().all()


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [2**31, 10**400, -1, True, 2.0, [[2]], {"id": 2}, "2"], ids=str)
def test_token_ids_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, key: value}))
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} is ")
    if key == "eos_token_id":
        write_single(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({key: [1, value]}))
        assert refused(tmp_path).startswith(f"{tmp_path / 'generation_config.json'}: {key} is ")


def test_an_end_token_named_often_counts_once() -> None:
    assert parse_config({**VALUES, "eos_token_id": [7, 2, 7, 2**31 - 1]}).eos_token_ids == (7, 2, 2**31 - 1)


@pytest.mark.parametrize("key", ["hidden_size", "eos_token_id", "rope_theta", "pretraining_tp"])
def test_values_given_in_python_may_be_of_any_length(key: str) -> None:
    with pytest.raises(UserError, match=key):
        parse_config({**VALUES, key: -(10**5000)})
    with pytest.raises(UserError, match=key):
        parse_config({**VALUES, key: 10**5000})


ESCAPES = "\x1b]0;title\x07\x1b[2J \x9b31m \r\n\u202e\u2028 \ud800 \x00"


def test_escapes_from_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """By names of tensors, and values of keys."""
    write_single(tmp_path)
    rewrite(tmp_path / SINGLE_FILE, lambda tensors: tensors.update({"\x1b[2J\x9bspare": torch.zeros(1)}))
    assert "tensor \\x1b[2J\\x9bspare is left over" in refused(tmp_path)
    edit_header(tmp_path / SINGLE_FILE, lambda header: header.update({ESCAPES: 1}))
    assert refused(tmp_path).isprintable()
    for changes in ({"hidden_act": ESCAPES}, {"eos_token_id": ESCAPES}, {"model_type": ESCAPES}):
        (tmp_path / "config.json").write_text(json.dumps({**VALUES, **changes}))
        assert refused(tmp_path).isprintable()


def test_printable() -> None:
    assert printable("a\x1b[2J\x9b\r\nb\tc\ud800é日") == "a\\x1b[2J\\x9b b c\\ud800é日"
    long = printable("x" * 10**6 + "end")
    assert len(long) < 2100 and long.startswith("xxx") and long.endswith("end")


def test_quoted() -> None:
    assert quoted("a") == "'a'" and quoted(10**5000) == "an integer of too many digits to show"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({*VALUES, "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "dtype", "torch_dtype", "mlp_bias"})
ROPE_KEYS = ("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@settings(max_examples=400, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=3),
    rope=st.none() | st.dictionaries(st.sampled_from(ROPE_KEYS), JSON_VALUES | st.sampled_from(["linear", "llama3"])),
)
def test_no_configuration_ends_otherwise(changes: dict[str, Any], rope: dict[str, Any] | None) -> None:
    values = {**VALUES, **changes, **({} if rope is None else {"rope_scaling": rope})}
    try:
        models.rope.inverse_frequencies(parse_config(values))
    except UserError as error:
        assert str(error).isprintable()


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([NORM, MATRIX, "__metadata__", "new"]), entry=JSON_VALUES)
def test_no_entry_of_a_header_ends_otherwise(name: str, entry: Any) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory)
        write_single(path)
        edit_header(path / SINGLE_FILE, lambda header: header.update({name: entry}))
        try:
            open_checkpoint(path)
        except UserError as error:
            assert str(error).isprintable()


@settings(max_examples=200, deadline=None)
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=JSON_VALUES | st.lists(st.integers(0, 2**65), max_size=3) | st.sampled_from(["F64", "I8", "F8_E4M3", "BF16"]),
)
def test_no_field_of_an_entry_ends_otherwise(field: str, value: Any) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory)
        write_single(path)
        edit_header(path / SINGLE_FILE, lambda header: header[MATRIX].update({field: value}))
        try:
            open_checkpoint(path)
        except UserError as error:
            assert str(error).isprintable()
