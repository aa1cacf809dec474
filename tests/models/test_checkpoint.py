"""Checkpoints as they are found: one file or shards, three number types, old buffers, tied heads, hub ids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from models.errors import UserError
from models.locate import locate
from models.packed import pack
from models.weights import EMBEDDING, HEAD, Weights, expected_tensors
from tests.support.configs import make_model, save_checkpoint


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return dict(Weights.collect(open_checkpoint(directory).source).by_name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_every_tensor_as_it_was_saved(shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name = "all_biases_linear_head24"
    save_checkpoint(name, tmp_path, dtype, shard)
    assert (tmp_path / SINGLE_FILE).exists() == (shard == "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= (1 if shard == "5GB" else 3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.directory == tmp_path and checkpoint.stored_dtype == dtype
    loaded = tensors_of(tmp_path)
    assert loaded.keys() == expected_tensors(checkpoint.config).keys()
    for key, parameter in make_model(name).to(dtype).named_parameters():
        assert loaded[key].dtype == dtype
        assert torch.equal(loaded[key], parameter)


def test_shards_pack_as_one_file_does(tmp_path: Path) -> None:
    whole = open_checkpoint(save_checkpoint("gqa4_llama3_tied", tmp_path / "whole", torch.bfloat16))
    parts = open_checkpoint(save_checkpoint("gqa4_llama3_tied", tmp_path / "parts", torch.bfloat16, "100KB"))
    assert whole.config == parts.config
    first, second = pack(whole.source, whole.config), pack(parts.source, parts.config)
    assert torch.equal(first.weights, second.weights) and torch.equal(first.constants, second.constants)


def test_mixed_types_in_one_file(tmp_path: Path) -> None:
    """Some tools keep norms in fp32."""
    save_checkpoint("gqa2", tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 2**-20
    save_file(tensors, tmp_path / SINGLE_FILE)
    checkpoint = open_checkpoint(tmp_path)
    model = pack(checkpoint.source, checkpoint.config)
    start = model.tape.norm_offset("final")
    stored = model.constants[start : start + checkpoint.config.hidden_size]
    assert torch.equal(stored, tensors["model.norm.weight"])
    assert checkpoint.stored_dtype == torch.bfloat16


def test_old_rope_buffers_are_passed_over(tmp_path: Path) -> None:
    save_checkpoint("mha", tmp_path)
    before = tensors_of(tmp_path)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8).double() for layer in range(2)}
    save_file({**load_file(tmp_path / SINGLE_FILE), **buffers}, tmp_path / SINGLE_FILE)
    assert tensors_of(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tied_head_may_be_saved_twice(head_dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint("gqa2", tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file({**tensors, HEAD: tensors[EMBEDDING].to(head_dtype, copy=True)}, tmp_path / SINGLE_FILE)
    assert tensors_of(tmp_path).keys() == tensors.keys()


def test_one_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    """As transformers has it: an index left beside a whole file is not read."""
    save_checkpoint("mha", tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert len(tensors_of(tmp_path)) == 21


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache is a directory of links to files elsewhere."""
    save_checkpoint("mha", tmp_path / "blobs", shard="60KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert tensors_of(tmp_path / "snapshot").keys() == tensors_of(tmp_path / "blobs").keys()


def mapped_shards(directory: Path) -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if line.endswith(".safetensors") and str(directory) in line}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
def test_no_shard_stays_mapped(tmp_path: Path) -> None:
    """Peak memory is the largest shard, not their sum: `bench/load.py` measures it, this sees why."""
    save_checkpoint("wide_mlp_long_k", tmp_path, shard="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    checkpoint = open_checkpoint(tmp_path)
    assert mapped_shards(tmp_path) == set()
    for _, tensor in checkpoint.source.tensors():
        tensor.sum()
        assert len(mapped_shards(tmp_path)) == 1
        del tensor
    assert mapped_shards(tmp_path) == set()


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("mha", tmp_path)
    asked: list[str] = []

    def download(repository: str, **options: Any) -> str:
        asked.append(repository)
        assert "*.safetensors" in options["allow_patterns"]
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint("owner/some-model").directory == tmp_path
    assert asked == ["owner/some-model"]


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the many that a repository may hold, with the other parts where it was split."""
    asked: list[tuple[str, str]] = []

    def download(hub_id: str, name: str) -> str:
        asked.append((hub_id, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert locate("owner/some-GGUF/model.Q4_K_M.gguf") == tmp_path / "model.Q4_K_M.gguf"
    assert locate("owner/some-GGUF/Q8_0/m-00001-of-00002.gguf") == tmp_path / "Q8_0" / "m-00001-of-00002.gguf"
    names = ["model.Q4_K_M.gguf", "Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf"]
    assert asked == [("owner/some-GGUF", name) for name in names]


def test_one_file_with_its_configuration_beside_it(tmp_path: Path) -> None:
    """The whole checkpoint where the file is a part of it, else that file alone."""
    whole = save_checkpoint("gqa2", tmp_path / "whole", torch.bfloat16)
    parts = save_checkpoint("gqa2", tmp_path / "parts", torch.bfloat16, "100KB")
    expected = tensors_of(whole)
    (whole / "other.safetensors").write_bytes((whole / SINGLE_FILE).read_bytes())
    shard = next(parts.glob("model-00001-of-*.safetensors"))
    for file in (whole / SINGLE_FILE, whole / "other.safetensors", shard):
        found = tensors_of(file)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        assert open_checkpoint(file).directory == file.parent


def test_a_directory_of_several_models_in_gguf(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds several models, a\.gguf and b\.gguf among them: give one of the files"):
        locate(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert locate(tmp_path) == tmp_path / "a.gguf"


def test_a_directory_by_the_name_of_a_file(tmp_path: Path) -> None:
    directory = save_checkpoint("gqa2", tmp_path / "model.gguf", torch.bfloat16)
    assert open_checkpoint(directory).directory == directory
