"""A Llama model as plain PyTorch, one readable line an operation: what every other implementation is compared with.

Follows `LlamaForCausalLM` of transformers (eager attention) down to where it rounds, so in bf16 it also shows bf16's
own error. Knows nothing of tapes, instructions or batches: one sequence, weights by their Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from models.config import ModelConfig
from models.rope import inverse_frequencies
from models.weights import EMBEDDING, HEAD


class Reference:
    """A model with its KV cache. `tensors` are copied to `dtype` (those already in it are shared).

    `logits` starts a new sequence, `extend` continues it. Any dtype works; fp64 is the judge of fp32.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.config = config
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
        residual = self.tensors[EMBEDDING][torch.tensor(list(token_ids), dtype=torch.long)]  # [tokens, hidden]
        turn = self._angles(len(token_ids))
        for layer in range(self.config.num_layers):
            normed = self._norm(residual, f"model.layers.{layer}.input_layernorm")
            residual = residual + self._attention(layer, normed, turn)
            normed = self._norm(residual, f"model.layers.{layer}.post_attention_layernorm")
            residual = residual + self._mlp(layer, normed)
        self.position += len(token_ids)
        head = self.tensors[EMBEDDING if self.config.tied_embeddings else HEAD]
        return linear(self._norm(residual, "model.norm"), head).float()

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

    def _linear(self, x: Tensor, module: str) -> Tensor:
        return linear(x, self.tensors[f"{module}.weight"], self.tensors.get(f"{module}.bias"))

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
        module = f"model.layers.{layer}.self_attn"
        config, tokens = self.config, len(x)
        query = self._heads(x, f"{module}.q_proj", config.num_heads)  # [heads, tokens, head_dim]
        key = self._heads(x, f"{module}.k_proj", config.num_kv_heads)
        self._keys[layer] = torch.cat([self._keys[layer], _rotate(key, turn)], dim=1)  # [kv_heads, positions, head_dim]
        value = self._heads(x, f"{module}.v_proj", config.num_kv_heads)
        self._values[layer] = torch.cat([self._values[layer], value], dim=1)
        keys = self._keys[layer].repeat_interleave(config.group, dim=0)  # [heads, positions, head_dim]
        values = self._values[layer].repeat_interleave(config.group, dim=0)
        scores = _rotate(query, turn) @ keys.transpose(1, 2) * config.head_dim**-0.5  # [heads, tokens, positions]
        future = torch.ones(tokens, keys.shape[1], dtype=torch.bool).triu(self.position + 1)
        scores = scores.masked_fill(future, -torch.inf)
        wide = torch.promote_types(self.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=wide).to(self.dtype)
        return self._linear((weights @ values).transpose(0, 1).reshape(tokens, -1), f"{module}.o_proj")

    def _heads(self, x: Tensor, module: str, heads: int) -> Tensor:
        return self._linear(x, module).view(len(x), heads, self.config.head_dim).transpose(0, 1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        """SwiGLU (arXiv:2002.05202)."""
        module = f"model.layers.{layer}.mlp"
        gated = silu(self._linear(x, f"{module}.gate_proj")) * self._linear(x, f"{module}.up_proj")
        return self._linear(gated, f"{module}.down_proj")


def _rotate(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn dimension i with i + head_dim / 2, the "rotate half" form of RoPE: [heads, tokens, head_dim]."""
    cosine, sine = turn
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
