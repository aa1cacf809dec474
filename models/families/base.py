"""What a family of networks is, as data: what one of its layers holds, and how Hugging Face writes its configuration.

Tensor names, the tape, the reference, lowering and the kernel's geometry read `Layer`; nothing else states what a layer
is. Where a size is wanted, a property of `ModelConfig` is named. Knows no tape, no file and no family in particular.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config import ModelConfig

EMBEDDING = "model.embed_tokens"  # the modules outside the layers, which all families have
FINAL_NORM = "model.norm"
HEAD = "lm_head"


def layer_module(layer: int, module: str) -> str:
    """The full name of a module of one layer."""
    return f"model.layers.{layer}.{module}"


@dataclass(frozen=True)
class Module:
    """A linear module of a checkpoint, named within its layer. `rows`: the property of `ModelConfig` that counts its
    outputs. `other_names` are those that it has in some checkpoints."""

    name: str
    rows: str
    other_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Norm:
    """An RMS norm of the residual stream, named within its layer; `kind` is what `TapeLayout.norm_offset` calls it."""

    kind: str
    module: str


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer: `modules` whose rows it concatenates, in that order.

    `source` is what it multiplies: "hidden" (the residual stream, normed), "attention" or "mlp"; `columns` the property of
    `ModelConfig` that counts its inputs. `row_order` is one of `models.tape.ROW_ORDERS`. `norm` comes before it. `bias`
    is the property of `ModelConfig` that says whether it has biases, "" where it never has. `head_norms`, of "qkv" alone, are
    the RMS norms of each head of queries and of keys, over head_dim, between projection and rotation; with `norms_together`
    those of all queries and of all keys.

    Of `experts` there is one such matrix for each; "{expert}" in the names of its modules stands for its number. `stacked`
    are the tensors, named within the layer, in which checkpoints may hold all experts' modules: [experts, rows, columns];
    `published_stacked` where the published ones do.
    """

    kind: str
    modules: tuple[Module, ...]
    source: str
    columns: str
    row_order: str
    bias: str
    norm: Norm | None = None
    head_norms: tuple[str, ...] = ()
    norms_together: bool = False
    experts: bool = False
    stacked: tuple[str, ...] = ()
    published_stacked: bool = False

    def rows(self, config: ModelConfig, expert: int = 0) -> dict[str, int]:
        """Output rows of each module, of one expert where there are some."""
        return {module.name.format(expert=expert): getattr(config, module.rows) for module in self.modules}

    def copies(self, config: ModelConfig) -> range:
        """The experts that have such a matrix each; the number 0 alone where there is one for all."""
        return range(config.num_experts if self.experts else 1)

    def normed_rows(self, config: ModelConfig) -> tuple[int, ...]:
        """How many weights each of `head_norms` has."""
        sizes = (config.query_size, config.key_value_size) if self.norms_together else (config.head_dim, config.head_dim)
        return sizes[: len(self.head_norms)]

    def has_bias(self, config: ModelConfig) -> bool:
        """Whether its modules have biases."""
        return bool(self.bias) and bool(getattr(config, self.bias))


@dataclass(frozen=True)
class Layer:
    """The linears of a layer in the order in which a token meets them; attention is before the one that multiplies its
    output."""

    linears: tuple[Linear, ...]

    def linear(self, kind: str) -> Linear:
        """The linear of one kind; raises KeyError for a kind that the layer lacks."""
        for linear in self.linears:
            if linear.kind == kind:
                return linear
        raise KeyError(f"no linear {kind!r} in a layer of {', '.join(linear.kind for linear in self.linears)}")

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of the residual stream, in the order of their linears."""
        return tuple(dict.fromkeys(linear.norm for linear in self.linears if linear.norm))

    @property
    def experts(self) -> bool:
        """Whether it holds a mixture of experts."""
        return any(linear.experts for linear in self.linears)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    `name` is its `model_type`, `architecture` its only class. Keys of a configuration that set properties of
    `ModelConfig`: `booleans` and `numbers`, key by key; `sizes`, by the property, keys of integers, the first that is there;
    `fixed` are properties that no key sets. `defaults` stand for keys
    that are absent, `theta` for RoPE's. `window_switch` is the key that turns the sliding window on, "" where a window is
    always on, None where the family has none. `ignored` are keys that change nothing here though they would elsewhere.
    `presets` are published shapes, for weights that are made up.
    """

    name: str
    architecture: str
    layer: Layer
    defaults: Mapping[str, Any]
    booleans: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    window_switch: str | None = None
    theta: float = 10000.0
    ignored: tuple[str, ...] = ()
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
