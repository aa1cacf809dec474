"""Everything that can be wrong with the files of a checkpoint: one line that names the file, the tensor and the mend.

Each case damages one thing in a small sound checkpoint: two layers, a tied head; one file, or two shards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from models.errors import UserError
from models.weights import EMBEDDING, HEAD
from tests.support.damage import (
    FIRST,
    SECOND,
    VALUES,
    edit_header,
    overlap,
    past_the_end,
    read_index,
    refused,
    rewrite,
    twice,
    write_index,
    write_shards,
    write_single,
)

NORM = "model.norm.weight"
Damage = Callable[[Path], object]


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def drop_from_shard(directory: Path) -> None:
    rewrite(directory / SECOND, lambda tensors: tensors.pop(NORM))


def drop_from_index(directory: Path) -> None:
    write_index(directory, {name: shard for name, shard in read_index(directory).items() if name != NORM})


# what is done to the directory, the file that the line starts with, and what else the line holds
SINGLE_CASES: dict[str, tuple[Damage, str, list[str]]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json", ["no such file"]),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{'a': 1}"), "config.json", ["not valid JSON"]),
    "config is not text": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json",
        ["not valid JSON"],
    ),
    "config is cut off": (lambda d: (d / "config.json").write_text('{"a": [1, '), "config.json", ["not valid JSON"]),
    "config is nested without end": (
        lambda d: (d / "config.json").write_text("[" * 10**5),
        "config.json",
        ["not valid JSON"],
    ),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json", ["a list", "object"]),
    "config is a directory": (
        lambda d: become_directory(d / "config.json"),
        "config.json",
        ["cannot be read"],
    ),
    "generation config is damaged": (
        lambda d: (d / "generation_config.json").write_text("{"),
        "generation_config.json",
        ["not valid JSON"],
    ),
    "generation config end token": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "end"}'),
        "generation_config.json",
        ["eos_token_id", "'end'"],
    ),
    "no weights": (lambda d: (d / SINGLE_FILE).unlink(), "", [SINGLE_FILE, INDEX_FILE, "save_pretrained"]),
    "only pickled weights": (
        lambda d: (d / SINGLE_FILE).rename(d / "pytorch_model.bin"),
        "",
        [SINGLE_FILE, "found pytorch_model.bin", "save_pretrained"],
    ),
    "empty file": (lambda d: (d / SINGLE_FILE).write_bytes(b""), SINGLE_FILE, ["0 bytes", "too short"]),
    "length without header": (lambda d: (d / SINGLE_FILE).write_bytes(bytes(8)), SINGLE_FILE, ["8 bytes", "too short"]),
    "header longer than the file": (
        lambda d: (d / SINGLE_FILE).write_bytes(struct.pack("<Q", 5000) + b"{}"),
        SINGLE_FILE,
        ["header of 5000 bytes in a file of 10"],
    ),
    "a page of HTML": (
        lambda d: (d / SINGLE_FILE).write_bytes(b"<!DOCTYPE html><html></html>"),
        SINGLE_FILE,
        ["header of", "damaged"],
    ),
    "a git-lfs pointer": (
        lambda d: (d / SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        SINGLE_FILE,
        ["header of", "damaged"],
    ),
    "header is not JSON": (
        lambda d: (d / SINGLE_FILE).write_bytes(struct.pack("<Q", 4) + b"{{}}rest"),
        SINGLE_FILE,
        ["header", "not valid JSON"],
    ),
    "header is not text": (
        lambda d: (d / SINGLE_FILE).write_bytes(struct.pack("<Q", 4) + b"\xff\xff\xff\xffrest"),
        SINGLE_FILE,
        ["header", "not valid JSON"],
    ),
    "header is a list": (
        lambda d: edit_header(d / SINGLE_FILE, lambda _: "[]"),
        SINGLE_FILE,
        ["header", "not a JSON object"],
    ),
    "metadata is not text": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h.update(__metadata__={"n": 1})),
        SINGLE_FILE,
        ["not a valid safetensors file"],
    ),
    "tensor twice in the header": (lambda d: edit_header(d / SINGLE_FILE, twice), SINGLE_FILE, [NORM, "twice"]),
    "entry is not an object": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h.update({NORM: 7})),
        SINGLE_FILE,
        [NORM, "bad header entry"],
    ),
    "negative shape": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h[NORM].update(shape=[-64])),
        SINGLE_FILE,
        [NORM, "bad header entry"],
    ),
    "shape is text": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h[NORM].update(shape="64")),
        SINGLE_FILE,
        [NORM, "bad header entry"],
    ),
    "one offset": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h[NORM].update(data_offsets=[0])),
        SINGLE_FILE,
        [NORM, "bad header entry"],
    ),
    "offsets run backwards": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h[NORM].update(data_offsets=[128, 0])),
        SINGLE_FILE,
        [NORM, "offsets 128 to 0"],
    ),
    "offsets and shape disagree": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h[NORM].update(shape=[63])),
        SINGLE_FILE,
        [NORM, "126 bytes"],
    ),
    "offsets past the end": (
        lambda d: edit_header(d / SINGLE_FILE, past_the_end),
        SINGLE_FILE,
        ["cut off within tensor", "short"],
    ),
    "offsets overlap": (lambda d: edit_header(d / SINGLE_FILE, overlap), SINGLE_FILE, ["overlaps"]),
    "hole between tensors": (
        lambda d: edit_header(d / SINGLE_FILE, lambda h: h.pop("model.layers.0.mlp.up_proj.weight")),
        SINGLE_FILE,
        ["hole"],
    ),
    "cut off": (
        lambda d: cut(d / SINGLE_FILE, 100),
        SINGLE_FILE,
        ["cut off within tensor", "100 bytes short"],
    ),
    "bytes too many": (
        lambda d: (d / SINGLE_FILE).open("ab").write(b"xyz"),
        SINGLE_FILE,
        ["3 bytes after the last tensor"],
    ),
    "tensor missing": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight")),
        SINGLE_FILE,
        ["model.layers.1.self_attn.o_proj.weight is missing", "download"],
    ),
    "no prefix": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update(embed_tokens=t.pop(EMBEDDING))),
        SINGLE_FILE,
        [f"{EMBEDDING} is missing"],
    ),
    "untied head missing": (
        lambda d: (d / "config.json").write_text(json.dumps({**VALUES, "tie_word_embeddings": False})),
        SINGLE_FILE,
        [f"{HEAD} is missing", "tie_word_embeddings"],
    ),
    "tensor left over": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(4)})),
        SINGLE_FILE,
        ["model.layers.2.mlp.up_proj.weight is left over", "config.json"],
    ),
    "bias left over": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
        SINGLE_FILE,
        ["q_proj.bias is left over", "attention_bias"],
    ),
    "shape": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 65)})),
        SINGLE_FILE,
        ["model.layers.0.mlp.up_proj.weight has shape [128, 65]", "[128, 64]"],
    ),
    "transposed": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(128, 64)})),
        SINGLE_FILE,
        ["down_proj.weight has shape [128, 64]", "[64, 128]"],
    ),
    "no dimensions": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({NORM: torch.tensor(1.0)})),
        SINGLE_FILE,
        [NORM, "shape []", "[64]"],
    ),
    "integer weights": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})),
        SINGLE_FILE,
        [NORM, "I8", "BF16"],
    ),
    "fp64 weights": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({NORM: torch.ones(64, dtype=torch.float64)})),
        SINGLE_FILE,
        [NORM, "F64", "BF16"],
    ),
    "tied head differs": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({HEAD: t[EMBEDDING] + 1})),
        SINGLE_FILE,
        [HEAD, "differs", "tie_word_embeddings"],
    ),
    "tied head of another shape": (
        lambda d: rewrite(d / SINGLE_FILE, lambda t: t.update({HEAD: torch.zeros(7, 64)})),
        SINGLE_FILE,
        [HEAD, "shape [7, 64]"],
    ),
}

SHARD_CASES: dict[str, tuple[Damage, str, list[str]]] = {
    "shard missing": (lambda d: (d / SECOND).unlink(), SECOND, ["shard is missing", "model.layers."]),
    "shard cut off": (
        lambda d: cut(d / SECOND, 1),
        SECOND,
        ["cut off within tensor", "1 bytes short"],
    ),
    "shard is empty": (lambda d: (d / FIRST).write_bytes(b""), FIRST, ["0 bytes"]),
    "shard is a directory": (lambda d: become_directory(d / FIRST), FIRST, ["cannot be read"]),
    "shard outside of the directory": (
        lambda d: write_index(d, {**read_index(d), NORM: f"../{SECOND}"}),
        INDEX_FILE,
        [NORM, f"../{SECOND}", "no file name in this directory"],
    ),
    "absolute shard": (
        lambda d: write_index(d, {**read_index(d), NORM: "/etc/passwd"}),
        INDEX_FILE,
        [NORM, "/etc/passwd", "no file name"],
    ),
    "shard of a long name": (lambda d: write_index(d, {NORM: "x" * 5000}), INDEX_FILE, [NORM, "xxx", "no file name"]),
    "shard is a number": (
        lambda d: write_index(d, {**read_index(d), NORM: 2}),
        INDEX_FILE,
        [NORM, "2", "no file name"],
    ),
    "shard is the directory itself": (
        lambda d: write_index(d, {**read_index(d), NORM: "."}),
        INDEX_FILE,
        [NORM, "'.'"],
    ),
    "index is not JSON": (lambda d: (d / INDEX_FILE).write_text("weights"), INDEX_FILE, ["not valid JSON"]),
    "index without a map": (lambda d: (d / INDEX_FILE).write_text("{}"), INDEX_FILE, ["no weight_map"]),
    "index with a list": (lambda d: write_index(d, [NORM]), INDEX_FILE, ["no weight_map"]),
    "tensor in two shards": (
        lambda d: rewrite(d / SECOND, lambda t: t.update({EMBEDDING: torch.zeros(100, 64)})),
        FIRST,
        [EMBEDDING, FIRST, SECOND, "remove one"],
    ),
    "tensor in another shard than listed": (
        lambda d: write_index(d, {**read_index(d), NORM: FIRST}),
        SECOND,
        [NORM, INDEX_FILE, "mend the index"],
    ),
    "tensor not in its shard": (
        drop_from_shard,
        SECOND,
        [f"{NORM} is missing", INDEX_FILE],
    ),
    "tensor in no list": (
        drop_from_index,
        SECOND,
        [NORM, "left over", INDEX_FILE],
    ),
    "tensor in no shard and no list": (
        lambda d: [change(d) for change in (drop_from_shard, drop_from_index)],
        INDEX_FILE,
        [f"{NORM} is missing"],
    ),
    "shape in a shard": (
        lambda d: rewrite(d / SECOND, lambda t: t.update({NORM: torch.zeros(65)})),
        SECOND,
        [NORM, "shape [65]", "[64]"],
    ),
}


@pytest.mark.parametrize("case", SINGLE_CASES)
def test_single_file(case: str, tmp_path: Path) -> None:
    check_damage(write_single, SINGLE_CASES[case], tmp_path)


@pytest.mark.parametrize("case", SHARD_CASES)
def test_shards(case: str, tmp_path: Path) -> None:
    check_damage(write_shards, SHARD_CASES[case], tmp_path)


def check_damage(write: Callable[[Path], None], case: tuple[Damage, str, list[str]], directory: Path) -> None:
    damage, file, fragments = case
    write(directory)
    open_checkpoint(directory)  # sound until it is damaged
    damage(directory)
    message = refused(directory)
    assert message.startswith(f"{directory / file if file else directory}: ")
    for fragment in fragments:
        assert fragment in message


def test_a_file_that_changes_after_it_was_checked(tmp_path: Path) -> None:
    write_shards(tmp_path)
    source = open_checkpoint(tmp_path).source
    tmp_path.joinpath(SECOND).write_bytes(b"gone")
    with pytest.raises(UserError, match=SECOND):
        list(source.tensors())


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 2300), byte=st.integers(0, 255), length=st.none() | st.integers(0, 4000))
def test_no_damage_to_a_header_ends_otherwise(place: int, byte: int, length: int | None) -> None:
    """Any byte changed, any length cut to: the model opens, and then reads, or one line refuses it."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        write_single(directory)
        data = bytearray((directory / SINGLE_FILE).read_bytes()[:length])
        if place < len(data):
            data[place] = byte
        (directory / SINGLE_FILE).write_bytes(data)
        try:
            tensors = dict(open_checkpoint(directory).source.tensors())
        except UserError as error:
            assert SINGLE_FILE in str(error) and "\n" not in str(error)
        else:
            assert len(tensors) == 20
