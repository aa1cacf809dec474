"""A model of any family as plain PyTorch, one readable line an operation: what every other implementation is compared with.

Follows the family's class of transformers (eager attention) down to where it rounds, so in bf16 it also shows bf16's own
error. Knows nothing of tapes, instructions or batches: one sequence, weights by their Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from models.config import ModelConfig
from models.families import layer_of
from models.families.base import FINAL_NORM, layer_module
from models.rope import inverse_frequencies
from models.weights import EMBEDDING, HEAD


class Reference:
    """A model with its KV cache. `tensors` are copied to `dtype` (those already in it are shared).

    `logits` starts a new sequence, `extend` continues it. Any dtype works; fp64 is the judge of fp32.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.layer = layer_of(config)
        self.dtype = dtype
        self.tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.position = 0
        self._frequencies = inverse_frequencies(config)
        self._keys: list[Tensor] = []  # a layer: [kv_heads, positions, head_dim]
        self._values: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        empty = torch.empty(self.config.num_kv_heads, 0, self.config.head_dim, dtype=self.dtype)
        self._keys = [empty] * self.config.num_layers
        self._values = [empty] * self.config.num_layers
        self.position = 0

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of a new sequence: fp32 [tokens, vocab_size]."""
        self.reset()
        return self.extend(token_ids)

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every one of some further tokens: fp32 [tokens, vocab_size]."""
        config = self.config
        embedded = self.tensors[EMBEDDING][torch.tensor(list(token_ids), dtype=torch.long)]  # [tokens, hidden]
        residual = embedded * config.embedding_multiplier
        turn = self._angles(len(token_ids))
        for layer in range(config.num_layers):
            residual = residual + self._attention(layer, residual, turn) * config.residual_multiplier
            added = self._mixture(layer, residual) if self.layer.experts else self._mlp(layer, residual)
            residual = residual + added * config.residual_multiplier
        self.position += len(token_ids)
        head = self.tensors[EMBEDDING if config.tied_embeddings else HEAD]
        return (linear(self._norm(residual, FINAL_NORM), head) / config.logits_scaling).float()

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation of a new sequence: up to `max_tokens` ids, the last of them an end token if one comes."""
        generated: list[int] = []
        logits = self.logits(prompt)
        while len(generated) < max_tokens:
            generated.append(int(logits[-1].argmax()))
            if generated[-1] in self.config.eos_token_ids or len(generated) == max_tokens:
                break
            logits = self.extend(generated[-1:])
        return generated

    def _products(self, layer: int, kind: str, x: Tensor, expert: int = 0) -> list[Tensor]:
        """What each module of a layer's linear makes of x [tokens, columns], normed first where a norm is before it."""
        of_kind = self.layer.linear(kind)
        x = self._norm(x, layer_module(layer, of_kind.norm.module)) if of_kind.norm else x
        names = [layer_module(layer, name) for name in of_kind.rows(self.config, expert)]
        return [linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")) for name in names]

    def _norm(self, x: Tensor, module: str) -> Tensor:
        """RMSNorm (arXiv:1910.07467), in fp32 or better."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_eps)
        return self.tensors[f"{module}.weight"] * (wide * scale).to(x.dtype)

    def _angles(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the next `count` positions, both [positions, head_dim]."""
        positions = torch.arange(self.position, self.position + count, dtype=torch.float32)
        angles = (positions[:, None] * self._frequencies).repeat(1, 2)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _attention(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        config, tokens = self.config, len(x)
        products = self._products(layer, "qkv", x)
        heads = [product.view(tokens, -1, config.head_dim) for product in products]  # [tokens, heads, head_dim]
        qkv = self.layer.linear("qkv")
        for number, norm in enumerate(qkv.head_norms):
            normed = self._norm(products[number] if qkv.norms_together else heads[number], layer_module(layer, norm))
            heads[number] = normed.view_as(heads[number])
        query, key, value = heads
        query, key, value = (heads.transpose(0, 1) for heads in (query, key, value))  # [heads, tokens, head_dim]
        self._keys[layer] = torch.cat([self._keys[layer], _rotate(key, turn)], dim=1)  # [kv_heads, positions, head_dim]
        self._values[layer] = torch.cat([self._values[layer], value], dim=1)
        keys = self._keys[layer].repeat_interleave(config.group, dim=0)  # [heads, positions, head_dim]
        values = self._values[layer].repeat_interleave(config.group, dim=0)
        scores = _rotate(query, turn) @ keys.transpose(1, 2) * config.attention_scale  # [heads, tokens, positions]
        future = torch.ones(tokens, keys.shape[1], dtype=torch.bool).triu(self.position + 1)
        scores = scores.masked_fill(future, -torch.inf)
        wide = torch.promote_types(self.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=wide).to(self.dtype)
        return self._products(layer, "o", (weights @ values).transpose(0, 1).reshape(tokens, -1))[0]

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        """SwiGLU (arXiv:2002.05202)."""
        gate, up = self._products(layer, "gate_up", x)
        return self._products(layer, "down", silu(gate) * up)[0]

    def _mixture(self, layer: int, x: Tensor) -> Tensor:
        """A mixture of experts (arXiv:1701.06538): each token takes the sum of its experts' outputs, weighted by the router;
        the experts in the order of their numbers, of equal scores the lower number."""
        config = self.config
        [scores] = self._products(layer, "router", x)  # [tokens, experts]
        shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(self.dtype, torch.float32))
        shares, experts = shares.sort(dim=-1, descending=True, stable=True)
        shares, experts = (found[:, : config.experts_per_token] for found in (shares, experts))
        if config.renormalised:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, places = (experts == expert).nonzero().unbind(1)
            gate, up = self._products(layer, "expert_gate_up", x[tokens], expert)
            [down] = self._products(layer, "expert_down", silu(gate) * up, expert)
            out.index_add_(0, tokens, down * shares[tokens, places, None].to(down.dtype))
        return out


def _rotate(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn dimension i with i + head_dim / 2, the "rotate half" form of RoPE: [heads, tokens, head_dim]."""
    cosine, sine = turn
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
