"""The adapters of vLLM and SGLang against stand-ins that answer as vLLM 0.26 and SGLang 0.5.17 do.

The real ones need a GPU; what can go wrong here is how their answers are read.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.compare.adapter import LoadSpec
from bench.compare.adapters.sglang_engine import Sglang
from bench.compare.adapters.vllm_engine import Vllm

SPEC = LoadSpec("/some/model", 256, 1000)
VOCABULARY = 6
LOGPROBS = [-3.0, -1.0, -2.0, -0.5, -4.0, -5.0]
RANKED = sorted(range(VOCABULARY), key=lambda token: -LOGPROBS[token])  # engines give the likeliest first


class StubLlm:
    """Greedy tokens after 2 are 10, 11, ..., after 3 15, 16, ...; steps of the engine give nothing, then one token or two."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options = model, options
        self.llm_engine = self
        self.left: list[list[int]] = []

    def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
        prompts = [prompts] if isinstance(prompts, dict) else prompts
        assert not use_tqdm and all(len(prompt["prompt_token_ids"]) == 2 for prompt in prompts)
        assert (parameters.temperature, parameters.ignore_eos, parameters.detokenize) == (0.0, True, False)
        flat = None
        if parameters.logprobs == -1:
            assert parameters.flat_logprobs and parameters.max_tokens == 1
            tokens = [RANKED[0], *RANKED]  # the sampled token first, and again in its place
            flat = SimpleNamespace(token_ids=tokens, logprobs=[LOGPROBS[token] for token in tokens])
        firsts = [5 * prompt["prompt_token_ids"][-1] for prompt in prompts]
        made = [tuple(range(first, first + parameters.max_tokens)) for first in firsts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=flat)]) for ids in made]

    def add_request(self, name: str, prompt: dict[str, Any], parameters: Any) -> None:
        assert prompt == {"type": "token", "prompt_token_ids": [1, 2]} and parameters.output_kind == "delta"
        tokens = list(range(10, 10 + parameters.max_tokens))
        self.left = [[], tokens[:1], tokens[1:3], tokens[3:]]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        tokens = self.left.pop(0)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])]


class StubParameters(SimpleNamespace):
    logprobs = None


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams = StubLlm, StubParameters  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "unset")  # so that it is as before afterwards
    adapter = Vllm()
    adapter.load(SPEC)
    yield adapter


def test_vllm_whole_and_streamed(vllm: Vllm) -> None:
    assert list(vllm.generate([1, 2], 4, False)) == [[10, 11, 12, 13]]
    assert list(vllm.generate([1, 2], 4, True)) == [[10], [11, 12], [13]]


def test_vllm_distribution(vllm: Vllm) -> None:
    assert np.array_equal(vllm.distribution([1, 2]), np.array(LOGPROBS, dtype=np.float32))


def test_vllm_settings(vllm: Vllm) -> None:
    assert vllm.options["max_model_len"] == 256 and vllm.options["kv_cache_memory_bytes"] == 2 * 256 * 1000
    settings = vllm.settings()
    assert settings["enable_prefix_caching"] == "False" and settings["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_vllm_together(vllm: Vllm) -> None:
    assert vllm.generate_together([[1, 2], [1, 3]], 3) == [[10, 11, 12], [15, 16, 17]]


@pytest.mark.usefixtures("vllm")
def test_vllm_is_told_of_its_weights_and_of_the_batch() -> None:
    adapter = Vllm(quantization="fp8")
    adapter.load(dataclasses.replace(SPEC, batch=2))
    assert adapter.options["quantization"] == adapter.settings()["quantization"] == "fp8"
    assert adapter.options["max_num_seqs"] == 2 and adapter.options["kv_cache_memory_bytes"] == 2 * 2 * 256 * 1000
    assert adapter.options["compilation_config"] == {"cudagraph_capture_sizes": [1, 2]}


@dataclasses.dataclass
class StubArguments:
    cuda_graph_bs_decode: list[int] | None = None


class StubEngine:
    """As the offline engine: a dictionary at the end, or one for every step; `incremental` as its option of that name."""

    incremental = False

    def __init__(self, model_path: str, **options: Any) -> None:
        self.options = options
        configuration = SimpleNamespace(vocab_size=VOCABULARY)
        arguments = SimpleNamespace(attention_backend="fa3")
        self.tokenizer_manager = SimpleNamespace(model_config=configuration, server_args=arguments)

    def generate(self, input_ids: list[Any], sampling_params: dict[str, Any], stream: bool = False, **more: Any) -> Any:
        if isinstance(input_ids[0], list):
            assert all(ids == [1, 2] for ids in input_ids) and not stream
            return [self.generate(ids, sampling_params) for ids in input_ids]
        assert input_ids == [1, 2] and sampling_params["temperature"] == 0.0 and sampling_params["ignore_eos"]
        tokens = list(range(10, 10 + sampling_params["max_new_tokens"]))
        if stream:
            return self.pieces(tokens)
        meta: dict[str, Any] = {"completion_tokens": len(tokens)}
        if more:
            assert more == {"return_logprob": True, "top_logprobs_num": VOCABULARY}
            meta["output_top_logprobs"] = [[(LOGPROBS[token], token, None) for token in RANKED]]
        return {"output_ids": tokens, "meta_info": meta}

    def pieces(self, tokens: list[int]) -> Iterator[dict[str, Any]]:
        seen = 0
        for count in (1, 1, 3, len(tokens)):
            ids = tokens[seen:count] if self.incremental else tokens  # a reference: it may already hold later tokens
            yield {"output_ids": ids, "meta_info": {"completion_tokens": count}}
            seen = count


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Sglang:
    module, arguments = ModuleType("sglang"), ModuleType("sglang.srt.server_args")
    module.Engine, arguments.ServerArgs = StubEngine, StubArguments  # type: ignore[attr-defined]
    for name, entry in (("sglang", module), ("sglang.srt", ModuleType("sglang.srt")), ("sglang.srt.server_args", arguments)):
        monkeypatch.setitem(sys.modules, name, entry)
    adapter = Sglang()
    adapter.load(SPEC)
    return adapter


@pytest.mark.parametrize("incremental", [False, True])
def test_sglang_whole_and_streamed(sglang: Sglang, incremental: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StubEngine, "incremental", incremental)
    assert list(sglang.generate([1, 2], 4, False)) == [[10, 11, 12, 13]]
    assert list(sglang.generate([1, 2], 4, True)) == [[10], [11, 12], [13]]


def test_sglang_together(sglang: Sglang) -> None:
    assert sglang.generate_together([[1, 2], [1, 2]], 3) == [[10, 11, 12]] * 2
    sglang.load(dataclasses.replace(SPEC, batch=4))
    assert sglang.options["cuda_graph_bs_decode"] == [1, 4] and sglang.options["max_running_requests"] == 4
    assert sglang.options["max_total_tokens"] == 2 * 4 * 256


def test_sglang_distribution(sglang: Sglang) -> None:
    assert np.array_equal(sglang.distribution([1, 2]), np.array(LOGPROBS, dtype=np.float32))


def test_sglang_settings(sglang: Sglang) -> None:
    assert sglang.options["cuda_graph_bs_decode"] == [1] and sglang.options["max_total_tokens"] == 512
    assert sglang.settings()["attention_backend"] == "fa3" and sglang.settings()["sampling_backend"] == "its default"
