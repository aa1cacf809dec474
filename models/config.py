"""What a Llama-class network is, in numbers: sizes, norms, RoPE, biases, special tokens.

The rest of the project reads `ModelConfig` and nothing else. Deliberately unknown here: how Hugging Face spells these
numbers (`models.hf_config`), where the weights lie (`models.checkpoint`), and how they are laid out (`models.tape`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import UserError, quoted

ROPE_KINDS = ("default", "linear", "llama3")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_position",
)
SIZE_LIMIT = 2**24  # token indices and positions travel as fp32, which counts exactly up to here
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of the normal fp32 numbers
TOKEN_LIMIT = 2**31  # token ids are int32
LAYER_LIMIT = 4096  # far above any model; keeps a damaged file from asking for millions of tensors


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched; formulas in `models.rope`. `factor` is used by "linear" and "llama3",
    the rest by "llama3" alone; `original_max_position` counts positions."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UserError(f"rope type {self.kind!r} is not supported: use a model with one of {', '.join(ROPE_KINDS)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_positive_float(f"rope {name}", getattr(self, name))
        _check_int("rope original_max_position", self.original_max_position, 1)
        if self.original_max_position >= SIZE_LIMIT:
            raise UserError(
                f"rope original_max_position is {quoted(self.original_max_position)}: "
                f"{SIZE_LIMIT} or more is not supported, use another model"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope high_freq_factor is {self.high_freq_factor}, not above low_freq_factor {self.low_freq_factor}: "
                "the llama3 interpolation needs high_freq_factor > low_freq_factor"
            )


@dataclass(frozen=True)
class ModelConfig:
    """One network. Every instance is valid: construction raises `UserError` for sizes that fit no network.

    `num_heads` query heads share `num_kv_heads` K/V heads in groups; `head_dim` need not be `hidden_size / num_heads`.
    `rms_eps` is added to the mean square. `eos_token_ids` may be empty. `max_position` is the longest context in
    tokens.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_int(name, getattr(self, name), 1)
            limit = LAYER_LIMIT if name == "num_layers" else SIZE_LIMIT
            if getattr(self, name) >= limit:
                shown = quoted(getattr(self, name))
                raise UserError(f"{name} is {shown}: {limit} or more is not supported, use another model")
        _check_positive_float("rms_eps", self.rms_eps)
        _check_positive_float("rope_theta", self.rope_theta)
        for name in ("tied_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            _check_int("a bos or eos token id", token, 0)
            if token >= TOKEN_LIMIT:
                raise UserError(f"a bos or eos token id is {quoted(token)}: it must be below {TOKEN_LIMIT}")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: RoPE turns pairs of dimensions, so it must be even")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads: "
                "num_heads must be a multiple of num_kv_heads"
            )

    @property
    def group(self) -> int:
        """Query heads that share one K/V head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_head_dim(self) -> int:
        """`head_dim` rounded up to whole blocks of 16 rows."""
        return 16 * math.ceil(self.head_dim / 16)

    @property
    def parameter_count(self) -> int:
        """Numbers in the checkpoint; a tied embedding counts once."""
        attention_width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        layer = (
            2 * self.hidden_size * (attention_width + kv_width)
            + 3 * self.hidden_size * self.intermediate_size
            + 2 * self.hidden_size
        )
        if self.attention_bias:
            layer += attention_width + 2 * kv_width + self.hidden_size
        if self.mlp_bias:
            layer += 2 * self.intermediate_size + self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` takes them back."""
        values = dataclasses.asdict(self)
        values["eos_token_ids"] = list(self.eos_token_ids)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises `UserError` for keys or values that `to_dict` never writes."""
        _check_keys("model configuration", values, cls)
        rope = values["rope_scaling"]
        _check_keys("rope_scaling", rope, RopeScaling)
        if not isinstance(values["eos_token_ids"], list):
            raise UserError(f"eos_token_ids is {values['eos_token_ids']!r}: it must be a list of token ids")
        return cls(**{**values, "rope_scaling": RopeScaling(**rope), "eos_token_ids": tuple(values["eos_token_ids"])})


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {quoted(value)}: it must be an integer of at least {least}")


def _check_positive_float(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST_FLOAT <= value <= MOST_FLOAT:
        raise UserError(
            f"{name} is {quoted(value)}: it must be a finite number above 0 that fp32 holds, "
            f"from {LEAST_FLOAT:.2g} to {MOST_FLOAT:.2g}"
        )


def _check_keys(what: str, values: Any, kind: type[ModelConfig | RopeScaling]) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{what} is {type(values).__name__}: it must be an object")
    names = {entry.name for entry in dataclasses.fields(kind)}
    if wrong := sorted(names ^ set(values)):
        raise UserError(f"{what}: {'missing' if wrong[0] in names else 'unknown'} key {wrong[0]!r}, write the file anew")


_LLAMA_32_ROPE = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
_LLAMA_3 = ModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    rms_eps=1e-5,
    rope_theta=500000.0,
    max_position=8192,
    bos_token_id=128000,
    eos_token_ids=(128001,),
)

# The published shapes of https://huggingface.co/meta-llama, for weights that are made up (`random:<preset>`).
PRESETS: dict[str, ModelConfig] = {
    "llama-3.2-1b": dataclasses.replace(
        _LLAMA_3,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        rope_scaling=_LLAMA_32_ROPE,
        tied_embeddings=True,
        max_position=131072,
    ),
    "llama-3.2-3b": dataclasses.replace(
        _LLAMA_3,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_heads=24,
        rope_scaling=_LLAMA_32_ROPE,
        tied_embeddings=True,
        max_position=131072,
    ),
    "llama-3-8b": _LLAMA_3,
}
