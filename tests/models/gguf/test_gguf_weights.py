"""Tensors out of GGUF files: every type, the order of rows, bit for bit what transformers makes of the same file, in little
memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.errors import UserError
from models.gguf.header import read_header
from models.gguf.weights import PIECE_ELEMENTS, SUPPORTED, Place, halves_first, read_tensor
from models.hf_config import parse_config
from models.packed import pack
from models.packing import unpack
from models.random_weights import RandomWeights
from models.weights import EMBEDDING, Weights
from tests.support import BUNDLED, ROOT
from tests.support.configs import MIXTURES, SMALL_CONFIGS
from tests.support.gguf_files import File, Stored, model_file, pair_by_pair

TYPES = [GGMLQuantizationType[name] for name in SUPPORTED]
COARSE = {"Q4_0": 0.15, "Q4_1": 0.15, "Q5_0": 0.08, "Q5_1": 0.08, "Q8_0": 0.01}  # of the largest value: half a step and bf16


def small(name: str = "gqa2", **changes: Any) -> ModelConfig:
    values = {"model_type": "llama", **SMALL_CONFIGS[name], "max_position_embeddings": 2048}
    return parse_config({**values, "bos_token_id": 1, "eos_token_id": 2, **changes})


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    return dict(RandomWeights(config, dtype=torch.float32).tensors())


def blocks(kind: GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Bytes of a matrix in any type, with scales of ordinary size: uint8 [rows, bytes a row]."""
    draw = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[kind]
    if kind.name in ("F32", "F16", "BF16"):
        values = draw.standard_normal((rows, columns)).astype(np.float32)
        if kind.name == "BF16":
            return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
        return values.astype({"F32": np.float32, "F16": np.float16}[kind.name]).view(np.uint8)
    raw = draw.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scales = draw.uniform(0.01, 0.1, (rows, columns // block, 2)).astype(np.float16).view(np.uint8)
    places = {"Q6_K": (208, 210), "Q8_0": (0, 2), "Q4_0": (0, 2), "Q5_0": (0, 2)}
    start, stop = places.get(kind.name, (0, 4))
    raw[:, :, start:stop] = scales[:, :, : stop - start]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_what_the_library_makes_of_it(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """More rows than one piece has, so that pieces are put together as well."""
    rows, columns = 2 * PIECE_ELEMENTS // 1024 + 5, 1024
    raw = blocks(kind, rows, columns)
    path = File({}, {"a": Stored(raw.tobytes(), (rows, columns), int(kind))}).write(tmp_path / "a.gguf")
    [tensor] = read_header(path).tensors
    with open(path, "rb") as file:
        found = read_tensor(file.fileno(), Place("a", tensor))
    wide = torch.from_numpy(np.array(dequantize(raw.view(np.float16) if kind.name == "F16" else raw.view(
        np.float32) if kind.name == "F32" else raw, kind)))  # fmt: skip
    assert found.shape == (rows, columns)
    assert found.dtype == {"F32": torch.float32, "F16": torch.float16}.get(kind.name, torch.bfloat16)
    assert torch.equal(found, wide.to(found.dtype))
    assert found.float().std() > 0.01


@pytest.mark.parametrize("heads,dim", [(1, 2), (3, 8), (4, 16), (2, 6)])
def test_rows_of_pairs_become_halves(heads: int, dim: int) -> None:
    rows = torch.arange(heads * dim)
    places = torch.from_numpy(halves_first(heads * dim, heads))
    back = torch.empty_like(rows)
    back[places] = pair_by_pair(rows, heads)
    assert torch.equal(back, rows)


@pytest.mark.parametrize("name", [name for name in SMALL_CONFIGS if name not in MIXTURES])  # no GGUF file of those is read
def test_a_checkpoint_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Configuration, biases and every tensor, through the keys, names and row orders of llama.cpp."""
    config = small(name)
    tensors = {key: tensor.half().float() for key, tensor in weights(config).items()}
    file = model_file(config, tensors)
    if config.rope_scaling.kind == "llama3":
        factors = llama3_factors(config)
        file.tensors["rope_freqs.weight"] = Stored(factors.tobytes(), factors.shape, int(GGMLQuantizationType.F32))
    checkpoint = open_checkpoint(file.write(tmp_path / "model.gguf"))
    assert checkpoint.config == config
    assert checkpoint.directory is None and checkpoint.stored_dtype == torch.float16
    found = Weights.collect(checkpoint.source, torch.float32).by_name
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def llama3_factors(config: ModelConfig) -> np.ndarray:
    """As the converter makes them, a loop over frequencies: fp32 [head_dim / 2]."""
    rope, factors = config.rope_scaling, []
    for index in range(0, config.head_dim, 2):
        length = 2 * np.pi * config.rope_theta ** (index / config.head_dim)
        longest, shortest = (rope.original_max_position / bound for bound in (rope.low_freq_factor, rope.high_freq_factor))
        if length < shortest:
            factors.append(1.0)
        elif length > longest:
            factors.append(rope.factor)
        else:
            share = (rope.original_max_position / length - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            factors.append(1 / ((1 - share) / rope.factor + share))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_near_the_true_ones(kind: str, tmp_path: Path) -> None:
    """That the library reads what it writes; the step is the largest value over half the levels."""
    config = small("head64_llama3", rope_parameters=None)
    tensors = weights(config)
    path = model_file(config, tensors, GGMLQuantizationType[kind]).write(tmp_path / "model.gguf")
    found = Weights.collect(open_checkpoint(path).source, torch.float32).by_name
    for name, tensor in tensors.items():
        assert (found[name] - tensor).abs().max() <= COARSE[kind] * tensor.abs().max()


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_transformers_reads_the_same_bits(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Onto the tape and back, beside `load_gguf_checkpoint` rounded to bf16: rows of 256 and 768, so that every type fits."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = small(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    tensors = weights(config)
    file = model_file(config, tensors, GGMLQuantizationType.F32)
    for index, (name, stored) in enumerate(file.tensors.items()):
        if len(stored.shape) == 2:
            raw = blocks(kind, *stored.shape, seed=index)
            file.tensors[name] = Stored(raw.tobytes(), stored.shape, int(kind))
    path = file.write(tmp_path / "model.gguf")
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL_CONFIGS["gqa2"]))
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=shell)["tensors"]
    checkpoint = open_checkpoint(path)
    packed = pack(checkpoint.source, checkpoint.config)
    ours = unpack(packed.tape, packed.weights, packed.constants)
    assert ours.keys() <= theirs.keys() | {EMBEDDING}
    for name, tensor in ours.items():
        assert torch.equal(tensor, torch.as_tensor(theirs[name]).to(tensor.dtype)), name


def test_the_library_reads_our_files_alike(tmp_path: Path) -> None:
    """The files of these tests are GGUF by another's judgement."""
    config = small()
    file = model_file(config, weights(config))
    file.values |= {"a.flag": True, "a.list": ["one", "zwei"], "a.row": np.arange(4, dtype=np.int16)}
    path = file.write(tmp_path / "model.gguf")
    ours, theirs = read_header(path), GGUFReader(path)
    for key, value in ours.values.items():
        contents = theirs.fields[key].contents()
        assert contents == (pytest.approx(value) if isinstance(value, float) else list(value) if key == "a.row" else value)
    assert {t.name: (t.kind, t.shape, t.start, t.size) for t in ours.tensors} == {
        t.name: (t.tensor_type, tuple(t.shape.tolist())[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    }


def test_parts_are_one_model(tmp_path: Path) -> None:
    config = small()
    whole = model_file(config, weights(config))
    names = list(whole.tensors)
    for number, part in enumerate((names[:5], names[5:6], names[6:])):
        split = {
            "split.no": np.uint16(number).item(),
            "split.count": 3,
            "split.tensors.count": len(names),
        }
        values = (whole.values if number == 0 else {}) | split
        File(values, {name: whole.tensors[name] for name in part}).write(tmp_path / f"m-{number + 1:05}-of-00003.gguf")
    for model in (tmp_path, tmp_path / "m-00001-of-00003.gguf"):
        found = Weights.collect(open_checkpoint(model).source, torch.float32).by_name
        assert found.keys() == weights(config).keys()
    with pytest.raises(UserError, match=r"part 2 of 3, give the first one, m-00001-of-00003.gguf"):
        open_checkpoint(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(UserError, match=r"m-00002-of-00003.gguf: part 2 of 3 is missing, download it to the same folder"):
        open_checkpoint(tmp_path)


def test_a_reader_that_leaves_early_leaves_no_thread(tmp_path: Path) -> None:
    config = small()
    path = model_file(config, weights(config)).write(tmp_path / "model.gguf")
    before = threading.active_count()
    tensors = open_checkpoint(path).source.tensors()
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_file_cut_off_while_it_is_read(tmp_path: Path) -> None:
    config = small()
    path = model_file(config, weights(config)).write(tmp_path / "model.gguf")
    source = open_checkpoint(path).source
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UserError, match="cut off within tensor .* since it was opened"):
        Weights.collect(source)


def test_the_bundled_model_in_gguf_has_the_same_tape(tmp_path: Path) -> None:
    bundled = open_checkpoint(BUNDLED)
    tensors = dict(Weights.collect(bundled.source, torch.float32).by_name)
    path = model_file(bundled.config, tensors, GGMLQuantizationType.BF16).write(tmp_path / "bundled.gguf")
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == bundled.config
    ours, theirs = pack(checkpoint.source, checkpoint.config), pack(bundled.source, bundled.config)
    assert torch.equal(ours.weights, theirs.weights) and torch.equal(ours.constants, theirs.constants)


def test_only_one_tensor_is_in_memory(tmp_path: Path) -> None:
    """Twelve tensors of 32 MB, widened: what the process takes grows by two of them and some pieces, not by twelve."""
    rows, columns, count = 4096, 4096, 12
    raw = blocks(GGMLQuantizationType.Q4_0, 64, columns).tobytes() * (rows // 64)
    path = File({}, {f"t{index:02}": Stored(raw, (rows, columns), 2) for index in range(count)}).write(tmp_path / "a.gguf")
    program = f"""
from pathlib import Path
from models.gguf.header import read_header
from models.gguf.weights import GgufSource, Place

def most():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

places = [Place(tensor.name, tensor) for tensor in read_header(Path({str(path)!r})).tensors]
for _ in GgufSource(tuple(places[:1])).tensors():
    pass
before = most()
for _ in GgufSource(tuple(places)).tensors():
    pass
print(most() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * rows * columns * 2
