"""Small GGUF files, sound ones and such as no library would write."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize

from models.config import ModelConfig

MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NUMBERS = {
    "u1": GGUFValueType.UINT8,
    "i1": GGUFValueType.INT8,
    "u2": GGUFValueType.UINT16,
    "i2": GGUFValueType.INT16,
    "u4": GGUFValueType.UINT32,
    "i4": GGUFValueType.INT32,
    "f4": GGUFValueType.FLOAT32,
    "u8": GGUFValueType.UINT64,
    "i8": GGUFValueType.INT64,
    "f8": GGUFValueType.FLOAT64,
}


@dataclass
class Stored:
    """A tensor as a file has it: bytes, shape with rows first, the type's number. `start`: where it lies, None for next."""

    data: bytes
    shape: tuple[int, ...]
    kind: int
    start: int | None = None


@dataclass
class File:
    """All that a file holds; `write` writes it as it is, sound or not."""

    values: dict[str, Any]
    tensors: dict[str, Stored] = field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None  # of tensors and keys, where the file lies about them
    alignment: int = 32

    def header(self) -> bytes:
        tensors, keys = self.counts or (len(self.tensors), len(self.values))
        out = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        out += b"".join(text(key) + tagged(value) for key, value in self.values.items())
        place = 0
        for name, stored in self.tensors.items():
            start = place if stored.start is None else stored.start
            shape = struct.pack(f"<I{len(stored.shape)}Q", len(stored.shape), *reversed(stored.shape))
            out += text(name) + shape + struct.pack("<IQ", stored.kind, start)
            place = start + padded(len(stored.data), self.alignment)
        return out

    def write(self, path: Path) -> Path:
        out = bytearray(self.header())
        out += bytes(padded(len(out), self.alignment) - len(out))
        for stored in self.tensors.values():
            out += stored.data + bytes(padded(len(stored.data), self.alignment) - len(stored.data))
        path.write_bytes(out)
        return path


def padded(count: int, alignment: int) -> int:
    return count + -count % alignment


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


@dataclass
class Raw:
    """A value as it stands in the file, its type before it."""

    content: bytes


def tagged(value: Any) -> bytes:
    """A value with its type before it: u32 for a whole number, fp32 for another."""
    if isinstance(value, Raw):
        return value.content
    if isinstance(value, bool):
        return struct.pack("<IB", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", GGUFValueType.STRING) + text(value)
    if isinstance(value, np.ndarray):
        kind = NUMBERS[value.dtype.str[1:]]
        return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + value.tobytes()
    return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value)) + b"".join(map(text, value))


def pair_by_pair(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converter orders them: the two that RoPE turns together one after the other."""
    order = [
        head * len(tensor) // heads + pair + half * len(tensor) // heads // 2
        for head in range(heads)
        for pair in range(len(tensor) // heads // 2)
        for half in range(2)
    ]
    return tensor[order]


def stored(tensor: torch.Tensor, kind: GGMLQuantizationType) -> Stored:
    """A tensor in the type asked for, or where its rows are too short for that in F32, as norms and biases always are."""
    if tensor.dim() == 1 or tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F32
    if kind is GGMLQuantizationType.BF16:
        data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    else:
        data = quantize(tensor.float().numpy(), kind).tobytes()
    return Stored(data, tuple(tensor.shape), int(kind))


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of Hugging Face's."""
    module, _, kind = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{MODULES[rest]}.{kind}"


def model_keys(config: ModelConfig, architecture: str = "llama") -> dict[str, Any]:
    """The keys that describe a network, without a tokenizer."""
    keys: dict[str, Any] = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": float(config.rms_eps),
    }
    if config.rope_scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling.factor)}
    if architecture == "granite":
        keys |= {
            "attention.scale": float(config.attention_scale),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    named = {f"{architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": architecture, "general.name": "a small one"} | named


def model_file(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    kind: GGMLQuantizationType = GGMLQuantizationType.F16,
    tokenizer: Mapping[str, Any] | None = None,
) -> File:
    """A model as llama.cpp's converter writes it."""
    values = model_keys(config, config.family) | dict(tokenizer or {})
    if config.bos_token_id is not None:
        values.setdefault("tokenizer.ggml.bos_token_id", config.bos_token_id)
    if config.eos_token_ids:
        values.setdefault("tokenizer.ggml.eos_token_id", config.eos_token_ids[0])
    turned = config.family in ("llama", "mistral", "granite")  # whose rows of queries and keys the converter reorders
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if turned else {}
    found = {}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        ordered = pair_by_pair(tensor, heads[module]) if module in heads else tensor
        found[gguf_name(name)] = stored(ordered, kind)
    return File(values, found)


def byte_level_keys(tokenizer: Mapping[str, Any], pre: str = "default") -> dict[str, Any]:
    """The keys of a byte-level tokenizer, from the values of its tokenizer.json."""
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    ids = sorted({*vocabulary.values(), *special})
    texts = {index: token for token, index in vocabulary.items()}
    texts |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts[index] for index in ids],
        "tokenizer.ggml.token_type": np.array([3 if index in special else 1 for index in ids], np.int32),
        "tokenizer.ggml.merges": merges,
    }
