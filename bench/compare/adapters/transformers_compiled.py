"""Hugging Face transformers at its fastest: a static KV cache, and the decode step compiled into a CUDA graph.

A loop of our own around the compiled step takes two thirds of the time of `generate` with the same cache (2.36 and 1.50 ms
a token on one H100), so the loop it is.  The prefill is not compiled: that would be one graph for every prompt length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec
from bench.compare.adapters.transformers_eager import load_model

if TYPE_CHECKING:
    import numpy

CACHE_STEP = 256  # attention reads the whole static cache, so it is no longer than the sequence needs, up to this


class TransformersCompiled(Adapter):
    """One compiled step for every cache length met, of the whole batch; tokens stay on the GPU until the last one is there."""

    scoring = "decode step after prefill"
    compile_options: dict[str, Any] = {"mode": "max-autotune"}

    def load(self, spec: LoadSpec) -> None:
        self.model = load_model(spec)
        self.batch = spec.batch
        self.caches: dict[int, Any] = {}
        self.steps: dict[int, Any] = {}

    def settings(self) -> dict[str, str]:
        options = ", ".join(f"{key}={value!r}" for key, value in self.compile_options.items())
        return {
            "decode step": f"torch.compile({options}, fullgraph=True), argmax inside",
            "cache": f"StaticCache, the sequence's length rounded up to {CACHE_STEP}",
            "attention": self.model.config._attn_implementation,
            "prefill": "eager",
        }

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        yield self.generate_together([prompt] * self.batch, tokens)[0]

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        import torch

        with torch.no_grad():
            length = len(prompts[0]) + tokens
            chosen = [self._prefill(prompts, length).argmax(-1, keepdim=True)]  # each [batch, 1]
            step = self._step(length)
            for _ in range(tokens - 1):
                torch.compiler.cudagraph_mark_step_begin()
                token, _ = step(chosen[-1])
                chosen.append(token.clone())  # the graph's own output is overwritten by its next replay
            found: list[list[int]] = torch.cat(chosen, dim=1).tolist()
            return found

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        import torch

        with torch.no_grad():
            self._prefill([prefix[:-1]] * self.batch, len(prefix))
            torch.compiler.cudagraph_mark_step_begin()
            _, logits = self._step(len(prefix))(torch.tensor([prefix[-1:]] * self.batch, device=self.model.device))
            return logits[0].float().cpu().numpy()

    def _prefill(self, prompts: Sequence[Sequence[int]], length: int) -> Any:
        """The logits after the prompts, [batch, vocabulary], with their keys and values in the cache of that length."""
        import torch

        cache = self._cache(length)
        cache.reset()
        ids = torch.tensor(prompts, device=self.model.device)
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _cache(self, length: int) -> Any:
        """The cache of sequences of `length` tokens, made when it is first needed: its addresses are in the graph."""
        from transformers import StaticCache

        size = cache_size(length)
        if size not in self.caches:
            self.caches[size] = StaticCache(config=self.model.config, max_cache_len=size)
        return self.caches[size]

    def _step(self, length: int) -> Any:
        """The compiled decode step on that cache: tokens [batch, 1] -> (next tokens [batch, 1], logits [batch,
        vocabulary])."""
        import torch

        cache = self._cache(length)

        def decode(token: Any) -> tuple[Any, Any]:
            logits = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
            return logits.argmax(-1, keepdim=True), logits

        size = cache_size(length)
        if size not in self.steps:
            self.steps[size] = torch.compile(decode, fullgraph=True, dynamic=False, **self.compile_options)
        return self.steps[size]


def cache_size(length: int) -> int:
    """Positions in the cache of a sequence of `length` tokens."""
    return -(-length // CACHE_STEP) * CACHE_STEP
