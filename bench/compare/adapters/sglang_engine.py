"""SGLang through its offline `Engine` class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec

if TYPE_CHECKING:
    import numpy

MEMORY_SHARE = 0.5  # of what is free at the start, for weights and cache; `max_total_tokens` bounds the cache below that


class Sglang(Adapter):
    """CUDA graphs for the batch and for one sequence, the engine's default attention; no radix cache, which would skip a
    repeat's prefill."""

    streaming = "asked"
    scoring = "the sampler's own logits, last token through prefill"

    def load(self, spec: LoadSpec) -> None:
        import sglang  # type: ignore[import-not-found]
        from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]

        known = {field.name for field in dataclasses.fields(ServerArgs)}
        graphs = "cuda_graph_bs_decode" if "cuda_graph_bs_decode" in known else "cuda_graph_bs"  # older releases
        self.options = {
            "dtype": "bfloat16",
            "context_length": spec.capacity,
            "max_running_requests": spec.batch,
            "max_total_tokens": 2 * spec.batch * spec.capacity,  # twice the need, for the engine's rounding
            "mem_fraction_static": MEMORY_SHARE,
            "disable_radix_cache": True,
            graphs: sorted({1, spec.batch}),
            "skip_tokenizer_init": True,
        }
        self.engine = sglang.Engine(model_path=spec.model, **self.options)

    def settings(self) -> dict[str, str]:
        chosen = {key: str(value) for key, value in self.options.items()}
        arguments = getattr(getattr(self.engine, "tokenizer_manager", None), "server_args", None)
        for name in ("attention_backend", "sampling_backend"):
            chosen[name] = str(getattr(arguments, name, "its default"))
        return chosen

    def ask(self, ids: list[Any], tokens: int, **more: Any) -> Any:
        """After one prompt, or after several."""
        parameters = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        return self.engine.generate(input_ids=ids, sampling_params=parameters, **more)

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        if not stream:
            yield list(self.ask(list(prompt), tokens)["output_ids"])
            return
        seen = 0
        for piece in self.ask(list(prompt), tokens, stream=True):
            # all tokens so far, perhaps some more by now, or with other settings only the new ones; the count is of all
            ids, count = piece["output_ids"], piece["meta_info"]["completion_tokens"]
            if count > seen:
                yield list(ids[seen:count] if len(ids) >= count else ids)
                seen = count

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        return [list(answer["output_ids"]) for answer in self.ask([list(prompt) for prompt in prompts], tokens)]

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        import numpy

        answer = self.ask(list(prefix), 1, return_logprob=True, top_logprobs_num=self.vocabulary())
        entries = answer["meta_info"]["output_top_logprobs"][0]  # (log-probability, token, text) for every token
        row = numpy.full(max(entry[1] for entry in entries) + 1, -numpy.inf, dtype=numpy.float32)
        row[[entry[1] for entry in entries]] = [entry[0] for entry in entries]
        return row

    def vocabulary(self) -> int:
        return int(self.engine.tokenizer_manager.model_config.vocab_size)

    def close(self) -> None:
        self.engine.shutdown()
