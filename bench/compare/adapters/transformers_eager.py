"""Hugging Face transformers as most people call it: `generate`, a dynamic cache, no compilation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec

if TYPE_CHECKING:
    import numpy


def load_model(spec: LoadSpec) -> Any:
    """The checkpoint in bf16 on the GPU, or on the CPU where there is none; no token ends a generation."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.bfloat16)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class TransformersEager(Adapter):
    streaming = "asked"
    scoring = "decode step after prefill"

    def load(self, spec: LoadSpec) -> None:
        self.model = load_model(spec)

    def settings(self) -> dict[str, str]:
        attention = self.model.config._attn_implementation
        return {"call": "model.generate(do_sample=False)", "cache": "dynamic", "attention": attention}

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        import torch

        if not stream:
            yield self.generate_together([prompt], tokens)[0]
            return
        ids = torch.tensor([prompt], device=self.model.device)
        yield from self._streamed(ids, self._options(ids, tokens))

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(ids, **self._options(ids, tokens))
        found: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return found

    def _options(self, ids: Any, tokens: int) -> dict[str, Any]:
        """What `generate` is asked for after some prompts, ids [prompts, tokens]."""
        import torch

        return {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}

    def _streamed(self, ids: Any, options: dict[str, Any]) -> Iterator[list[int]]:
        """`generate` in a thread, its tokens handed over as it puts them into a streamer."""
        queue: SimpleQueue[Any] = SimpleQueue()
        thread = Thread(target=self._generate_into, args=(queue, ids, options), daemon=True)
        thread.start()
        first = True  # `generate` puts the prompt first
        while (piece := queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if not first:
                yield piece
            first = False
        thread.join()

    def _generate_into(self, queue: SimpleQueue[Any], ids: Any, options: dict[str, Any]) -> None:
        import torch

        try:
            with torch.no_grad():
                self.model.generate(ids, streamer=TokenStreamer(queue), **options)
        except Exception as error:  # goes to the thread that waits
            queue.put(error)
        queue.put(None)

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        import torch

        ids = torch.tensor([prefix], device=self.model.device)
        with torch.no_grad():
            cache = self.model(ids[:, :-1], logits_to_keep=1, use_cache=True).past_key_values
            logits = self.model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        return logits[0, -1].float().cpu().numpy()


class TokenStreamer:
    """What `generate` takes as a streamer: every new token as a list of one id."""

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        self.queue = queue

    def put(self, value: Any) -> None:
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        """The end of the thread tells it."""
