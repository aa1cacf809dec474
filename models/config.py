"""What a Llama-class network is, in numbers: sizes, norms, RoPE, biases, special tokens.

The rest of the project reads `ModelConfig` and nothing else. Deliberately unknown here: how Hugging Face spells these
numbers and what a layer holds (`models.families`), where the weights lie (`models.checkpoint`), and how they are laid out
(`models.tape`).
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
MOST_EXPERTS = 128  # the kernel compares the scores of all of them with each other at once
_POSITIVE = ("rms_eps", "rope_theta", "embedding_multiplier", "residual_multiplier", "logits_scaling")
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
    tokens. `family` names the one of `models.families` whose layers these are; `qkv_bias`, `o_bias` and `mlp_bias` say
    which of its linears have a bias.

    Where a layer holds a mixture of experts, there are `num_experts` of `intermediate_size` units each, of which a token takes
    those `experts_per_token` that its router likes best; their weights are the router's softmax over all experts, divided by
    the sum of those chosen where they are `renormalised`. Both numbers are 0 where there are none.

    The embedding is multiplied by `embedding_multiplier`, what a block adds to the residual stream by
    `residual_multiplier`, the scores of attention by `attention_multiplier` (None: 1 / sqrt(head_dim)); the logits are
    divided by `logits_scaling` (Granite: arXiv:2408.13359).
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
    family: str = "llama"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    renormalised: bool = False
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
        for name in _POSITIVE:
            _check_positive_float(name, getattr(self, name))
        if self.attention_multiplier is not None:
            _check_positive_float("attention_multiplier", self.attention_multiplier)
        if not isinstance(self.family, str):
            raise UserError(f"family is {self.family!r}: it must be a name")
        for name in ("tied_embeddings", "qkv_bias", "o_bias", "mlp_bias", "renormalised"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            _check_int("a bos or eos token id", token, 0)
            if token >= TOKEN_LIMIT:
                raise UserError(f"a bos or eos token id is {quoted(token)}: it must be below {TOKEN_LIMIT}")
        self._check_experts()
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: RoPE turns pairs of dimensions, so it must be even")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads: "
                "num_heads must be a multiple of num_kv_heads"
            )

    def _check_experts(self) -> None:
        for name in ("num_experts", "experts_per_token"):
            _check_int(name, getattr(self, name), 0)
        if self.num_experts > MOST_EXPERTS:
            raise UserError(f"num_experts is {quoted(self.num_experts)}: more than {MOST_EXPERTS} are not supported")
        if not min(1, self.num_experts) <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"experts_per_token is {quoted(self.experts_per_token)} of {self.num_experts} experts: "
                "it must be at least 1 and no more than there are"
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
    def query_size(self) -> int:
        """Query rows of all heads, and so what attention gives."""
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Key rows of all heads, and as many value rows."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

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
