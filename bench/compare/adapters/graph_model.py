"""A Llama decode step in plain PyTorch, made to be captured into a CUDA graph: no host value changes between tokens.

Where it gains over the textbook form:
- q, k, v are one matrix, gate and up another; a residual addition is part of the matrix product (`addmm`).
- RoPE pairs stand side by side, by permuting the rows of q and k once, so that turning them is one complex product.
- Grouped-query attention is folded: the heads of one K/V head are the "queries" of one attention, which reads K and V once.
- A bucket's unused positions need no mask, for which there would be no split-KV kernel: K has one more column, 0 where a
  position is filled and very negative where not, and q has a 1 there.
- K and V of a layer are one cache, written by one copy.
Knows nothing of graphs and prompts (`bench.compare.adapters.cuda_graph`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from models.config import ModelConfig
from models.errors import UserError
from models.rope import inverse_frequencies
from models.weights import EMBEDDING, HEAD

FAMILIES = ("llama", "mistral", "qwen2")  # those that differ in sizes and biases alone
EMPTY = -30000.0  # times 1 / sqrt(head size) it is below -1000 up to head size 900: its exponential is 0 in fp32
ALIGNMENT = 8  # attention kernels want head sizes in multiples of this


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; matrices are [out, in], biases may be missing."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class GraphModel:
    """Weights, and `batch` sequences of one length with a KV cache of `capacity` positions each, all at fixed addresses on one
    device.

    State between steps: `token` [batch] are the last tokens, `position` [1] their position, `history` [batch, capacity] the
    tokens chosen so far, `count` [1] how many of each.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], capacity: int, device: torch.device, batch: int = 1
    ) -> None:
        if config.family not in FAMILIES:
            raise UserError(f"family {config.family!r} is not one that this engine computes: use one of {', '.join(FAMILIES)}")
        self.config, self.capacity, self.device, self.batch = config, capacity, device, batch
        self.embedding = tensors[EMBEDDING].to(device)
        self.head = self.embedding if config.tied_embeddings else tensors[HEAD].to(device)
        self.dtype = self.embedding.dtype
        self.norm = tensors["model.norm.weight"].to(device)
        self.layers = [self._layer(tensors, f"model.layers.{layer}") for layer in range(config.num_layers)]
        angles = torch.arange(capacity, dtype=torch.float32)[:, None] * inverse_frequencies(config)
        self.turns = torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)  # [capacity, head_dim / 2, 2]
        shape = (batch, 2 * config.num_kv_heads, capacity, config.head_dim + ALIGNMENT)
        self.caches = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in self.layers]  # K heads, then V heads
        sizes = (batch, 1, 1)
        self.token, self.position, self.count = (torch.zeros(size, dtype=torch.long, device=device) for size in sizes)
        self.history = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        heads = config.num_heads + 2 * config.num_kv_heads
        self.margin = torch.zeros(1, heads, ALIGNMENT, dtype=self.dtype, device=device)  # right of q, k and v
        self.margin[:, : config.num_heads, 0] = 1

    def _layer(self, tensors: Mapping[str, Tensor], name: str) -> Layer:
        def fused(module: str, parts: list[str], kind: str) -> Tensor | None:
            rows = [tensors.get(f"{name}.{module}.{part}.{kind}") for part in parts]
            if any(part is None for part in rows):
                return None
            return torch.cat([self._paired(part, row) for part, row in zip(parts, rows, strict=True)]).to(self.device)

        weights = {
            "qkv": ("self_attn", ["q_proj", "k_proj", "v_proj"]),
            "out": ("self_attn", ["o_proj"]),
            "gate_up": ("mlp", ["gate_proj", "up_proj"]),
            "down": ("mlp", ["down_proj"]),
        }
        parts = {key: fused(*place, "weight") for key, place in weights.items()}
        parts |= {f"{key}_bias": fused(*place, "bias") for key, place in weights.items()}
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        parts |= {key: tensors[f"{name}.{module}.weight"].to(self.device) for key, module in norms.items()}
        return Layer(**parts)  # type: ignore[arg-type]

    def _paired(self, part: str, rows: Tensor | None) -> Tensor:
        """The rows of q and k with dimensions i and i + head_dim / 2 side by side; other rows as they are."""
        assert rows is not None
        if part not in ("q_proj", "k_proj"):
            return rows
        half = self.config.head_dim // 2
        return rows.view(-1, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def reset(self) -> None:
        """Forget the sequences: no position of the cache is filled."""
        for cache in self.caches:
            cache[:, : self.config.num_kv_heads, :, self.config.head_dim] = EMPTY
        self.position.zero_()
        self.count.zero_()

    def prefill(self, prompts: Tensor) -> Tensor:
        """Fill the cache with prompts, int64 [batch, tokens]; the logits after them, [batch, vocabulary].  `position` is then
        that of the next tokens."""
        batch, count = prompts.shape
        config, turns = self.config, self.turns[:count].repeat(batch, 1, 1)
        residual = self.embedding[prompts.flatten()]  # [batch * tokens, hidden]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            heads = self._heads(layer, residual, turns)  # [batch * tokens, heads, width]
            heads = heads.unflatten(0, (batch, count)).transpose(1, 2)  # [batch, heads, tokens, width]
            cache[:, :, :count] = heads[:, config.num_heads :]
            query, key, value = heads[..., : config.head_dim].split(self._counts, dim=1)
            attended = scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=config.group > 1
            )  # [batch, heads, tokens, head_dim]
            residual = self._rest(layer, residual, attended.transpose(1, 2).reshape(batch * count, -1))
        self.position.fill_(count)
        last = residual[count - 1 :: count]  # [batch, hidden]
        return linear(rms_norm(last, self.norm.shape, self.norm, config.rms_eps), self.head)

    def choose(self, logits: Tensor) -> None:
        """Take the likeliest tokens, [batch, vocabulary] -> `token`, and note them in `history`."""
        self.token.copy_(logits.argmax(-1))
        self.history.index_copy_(1, self.count, self.token[:, None])
        self.count.add_(1)

    def step(self, bucket: int) -> Tensor:
        """Decode `token` at `position`, choose the next ones, and move on; the logits, [batch, vocabulary].

        Attention reads `bucket` positions, of which `position` must be one.
        """
        config = self.config
        residual = self.embedding[self.token]  # [batch, hidden]
        turn = self.turns[self.position]  # [1, head_dim / 2, 2]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            heads = self._heads(layer, residual, turn)  # [batch, heads, width]
            cache.index_copy_(2, self.position, heads[:, config.num_heads :, None])
            filled = cache[:, :, :bucket]
            attended = scaled_dot_product_attention(
                heads[:, : config.num_heads].unflatten(1, (config.num_kv_heads, config.group)),
                filled[:, : config.num_kv_heads],
                filled[:, config.num_kv_heads :],
                scale=config.head_dim**-0.5,
            )  # [batch, kv_heads, group, width]
            residual = self._rest(layer, residual, attended[..., : config.head_dim].flatten(1))
        logits = linear(rms_norm(residual, self.norm.shape, self.norm, config.rms_eps), self.head)
        self.choose(logits)
        self.position.add_(1)
        return logits

    @property
    def _counts(self) -> list[int]:
        """How many heads of q, k and v."""
        return [self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads]

    def _heads(self, layer: Layer, residual: Tensor, turn: Tensor) -> Tensor:
        """Heads of q and k, turned, and of v, for some tokens, each with its margin: [tokens, heads, width]."""
        config, tokens = self.config, len(residual)
        normed = rms_norm(residual, layer.attention_norm.shape, layer.attention_norm, config.rms_eps)
        heads = linear(normed, layer.qkv, layer.qkv_bias).view(tokens, -1, config.head_dim)
        turned, value = heads.split([config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=1)
        turned = rotate(turned.float().unflatten(-1, (-1, 2)), turn[:, None]).flatten(-2).to(self.dtype)
        return torch.cat([torch.cat([turned, value], dim=1), self.margin.expand(tokens, -1, -1)], dim=-1)

    def _rest(self, layer: Layer, residual: Tensor, attended: Tensor) -> Tensor:
        """From the heads' outputs, [tokens, heads * head_dim], to the residual after the layer."""
        residual = add_product(residual, attended, layer.out, layer.out_bias)
        normed = rms_norm(residual, layer.mlp_norm.shape, layer.mlp_norm, self.config.rms_eps)
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return add_product(residual, silu(gate) * up, layer.down, layer.down_bias)


def rotate(pairs: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs, [..., 2], by (cosine, sine), [..., 2]."""
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))  # one kernel
    (first, second), (cosine, sine) = pairs.unbind(-1), turn.unbind(-1)  # the compiler fuses these, but nothing complex
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def add_product(residual: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """residual + x @ matrix^T + bias, rounded once."""
    return torch.addmm(residual if bias is None else residual + bias, x, matrix.t())
