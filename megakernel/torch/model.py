"""The network as plain PyTorch operations on a static KV cache: some tokens in, their hidden states or logits out.

One sequence at a time; it is told at which position each piece of it begins, and in which part of the cache it lies.  Residual
stream, norms, softmax and logits in fp32, the inputs of matrices and the cache rounded to the weights' type, as the kernel has
them.  Knows no requests and no sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from megakernel.parts import BLOCK
from megakernel.torch.cache import Cache, CachePart
from megakernel.torch.product import Product
from megakernel.torch.weights import Mixture, Mlp, Weights
from models.config import ModelConfig
from models.rope import inverse_frequencies

SCORES = 2**24  # of attention at a time, so that a long context needs little memory


class TorchModel:
    """A model on one device, with a cache of at least `capacity` rows: for contexts of up to so many tokens together."""

    def __init__(self, config: ModelConfig, weights: Weights, capacity: int) -> None:
        self.config, self.weights, self.capacity = config, weights, capacity
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        # A CPU has fast attention in fp32 alone; what goes into it has been rounded all the same.
        self.attention_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self.product = Product(self.dtype, self.device)
        self.cosine, self.sine = turns(config, capacity, self.device)
        self.cache = Cache(config, -(-capacity // BLOCK), self.dtype, self.device)

    def extend(self, tokens: Tensor, past: int, part: CachePart) -> Tensor:
        """Read tokens, int64 [tokens], that follow `past` positions of a sequence: the residual stream [tokens, hidden]."""
        residual = self.weights.embedding[tokens].float() * self.config.embedding_multiplier  # [tokens, hidden]
        for layer in range(self.config.num_layers):
            residual = self.through(layer, residual, past, part)
        return residual

    def through(self, number: int, residual: Tensor, past: int, part: CachePart) -> Tensor:
        """The residual stream [tokens, hidden] after one layer."""
        layer, multiplier = self.weights.layers[number], self.config.residual_multiplier
        added = self.attention(number, self.norm(residual, layer.attention_norm), past, part)
        residual = residual + added * multiplier
        x = self.norm(residual, layer.mlp_norm)
        added = self.mixture(layer.mlp, x) if isinstance(layer.mlp, Mixture) else self.mlp(layer.mlp, x)
        return residual + added * multiplier

    def logits(self, residual: Tensor) -> Tensor:
        """What `extend` left of some tokens as logits, fp32 [tokens, vocab_size]."""
        products = self.product(self.weights.head, self.norm(residual, self.weights.final_norm), exact=True)
        return products / self.config.logits_scaling

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (arXiv:1910.07467)."""
        return rms_norm(x, weight.shape, weight, self.config.rms_eps)

    def mlp(self, mlp: Mlp, x: Tensor) -> Tensor:
        """SwiGLU (arXiv:2002.05202)."""
        gate, up = self.product(mlp.gate_up, x).chunk(2, dim=-1)
        return self.product(mlp.down, silu(gate) * up)

    def mixture(self, mixture: Mixture, x: Tensor) -> Tensor:
        """What the experts that the router chooses for each token make of it, weighted and added in the order of their numbers;
        of equal scores the lower number is chosen."""
        config = self.config
        shares = torch.softmax(self.product(mixture.router, x, exact=True), dim=-1)  # [tokens, experts]
        shares, experts = shares.sort(dim=-1, descending=True, stable=True)
        shares, experts = (found[:, : config.experts_per_token] for found in (shares, experts))
        if config.renormalised:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, places = (experts == expert).nonzero().unbind(1)
            out[tokens] += self.mlp(mixture.experts[expert], x[tokens]) * shares[tokens, places, None]
        return out

    def attention(self, number: int, x: Tensor, past: int, part: CachePart) -> Tensor:
        """Self-attention of a layer with the `past` positions in the cache, to which those of x are added."""
        config, tokens, layer = self.config, len(x), self.weights.layers[number]
        queries, end = config.num_heads, past + tokens
        heads = self.product(layer.qkv, x).view(tokens, queries + 2 * config.num_kv_heads, config.head_dim)
        turning, value = heads.split([queries + config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.head_norms:
            parts = zip(turning.split([queries, config.num_kv_heads], dim=1), layer.head_norms, strict=True)
            # the weights of one head, or of all together
            normed = [self.norm(part.reshape(tokens, -1, len(weight)), weight).view(part.shape) for part, weight in parts]
            turning = torch.cat(normed, dim=1)
        query, key = self.turned(turning, past).split([queries, config.num_kv_heads], dim=1)
        part.write(number, past, key, value)
        keys, values = part.read(number, end, self.attention_dtype)  # [kv_heads, end, head_dim] each
        query = query.to(self.dtype).to(self.attention_dtype)
        step = max(1, SCORES // (queries * end))
        mixed = [self.mixed(piece, keys, values, past + step * i) for i, piece in enumerate(query.split(step))]
        return self.product(layer.o, torch.cat(mixed) if len(mixed) > 1 else mixed[0])

    def turned(self, heads: Tensor, past: int) -> Tensor:
        """RoPE for [tokens, heads, head_dim] from position `past` on: dimension i turns with i + head_dim / 2."""
        cosine, sine = (table[past : past + len(heads), None] for table in (self.cosine, self.sine))
        return torch.addcmul(heads * cosine, heads.roll(self.config.head_dim // 2, -1), sine)

    def mixed(self, query: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
        """Causal attention of queries [tokens, heads, head_dim] from position `past` on: fp32 [tokens, heads * head_dim].

        Query heads that share a K/V head are rows of one product, so that keys and values are read once and never repeated.
        """
        tokens, heads, dim = query.shape
        group, end = self.config.group, past + tokens
        rows = query.view(tokens, -1, group, dim).permute(1, 2, 0, 3).reshape(1, -1, group * tokens, dim)
        mask = None
        if tokens > 1:
            position = torch.arange(end, device=self.device)
            mask = (position <= position[past:, None]).repeat(group, 1)  # [group * tokens, end]
        keys, values, scale = keys[None, :, :end], values[None, :, :end], self.config.attention_scale
        out = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
        return out.view(-1, group, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads * dim).float()


def turns(config: ModelConfig, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine of each dimension's angle, and the sine that its partner is taken with: fp32 [capacity, head_dim] each."""
    angles = torch.arange(capacity, dtype=torch.float32)[:, None] * inverse_frequencies(config)  # [capacity, head_dim / 2]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], dim=1).to(device), torch.cat([-sine, sine], dim=1).to(device)
