"""vLLM through its offline `LLM` class."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec

if TYPE_CHECKING:
    import numpy

MEMORY_SHARE = 0.2  # only checked against free memory at the start: the cache's bytes are given


class Vllm(Adapter):
    """Full and piecewise CUDA graphs for the batch and for one sequence; no prefix cache, which would skip the prefill of a
    repeat."""

    streaming = "asked"
    makes_weights = True
    scoring = "the sampler's own logits, last token through prefill"

    def __init__(self, **chosen: Any) -> None:
        """chosen: further arguments of `LLM`, such as a quantization."""
        self.chosen = chosen

    def load(self, spec: LoadSpec) -> None:
        if importlib.util.find_spec("flashinfer") is None:
            os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        from vllm import LLM  # type: ignore[import-not-found]

        self.options = {
            "dtype": "bfloat16",
            "max_model_len": spec.capacity,
            "max_num_seqs": spec.batch,
            "enable_prefix_caching": False,
            "compilation_config": {"cudagraph_capture_sizes": sorted({1, spec.batch})},
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": MEMORY_SHARE,
            "kv_cache_memory_bytes": 2
            * spec.batch
            * spec.capacity
            * spec.kv_bytes,  # twice the need, for the engine's rounding
            "max_logprobs": -1,
            **({"load_format": "dummy"} if spec.made_up else {}),
            **self.chosen,
        }
        self.llm = LLM(model=spec.model, **self.options)
        self.requests = 0

    def settings(self) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        return {key: str(value) for key, value in {**self.options, **variables}.items()}

    def parameters(self, tokens: int, **more: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        if stream:
            yield from self._streamed(prompt, tokens)
        else:
            yield self.generate_together([prompt], tokens)[0]

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(asked, self.parameters(tokens), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _streamed(self, prompt: Sequence[int], tokens: int) -> Iterator[list[int]]:
        """The loop inside `LLM.generate`, asking for the new tokens of every step."""
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        engine = self.llm.llm_engine
        self.requests += 1
        parameters = self.parameters(tokens, output_kind=RequestOutputKind.DELTA)
        engine.add_request(f"streamed-{self.requests}", {"type": "token", "prompt_token_ids": list(prompt)}, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if new := list(output.outputs[0].token_ids):
                    yield new

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        import numpy

        parameters = self.parameters(1, logprobs=-1, flat_logprobs=True)
        [output] = self.llm.generate({"prompt_token_ids": list(prefix)}, parameters, use_tqdm=False)
        flat = output.outputs[0].logprobs
        row = numpy.full(max(flat.token_ids) + 1, -numpy.inf, dtype=numpy.float32)
        row[flat.token_ids] = flat.logprobs
        return row

    def close(self) -> None:
        """The process ends next, and with it all of this."""
