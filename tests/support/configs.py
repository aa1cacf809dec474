"""The small models that every layer is tested with: keyword arguments of transformers' configuration of a family
("llama" where no `model_type` is given), by a name that says why.

Between them: MHA, GQA with 2, 4 and 8 query heads a K/V head, MQA, more query heads a K/V head than the GPU's matrix
instruction has columns; head sizes 8 to 128, some whose half is no multiple of 8 and some that are not hidden / heads; tied
and untied heads; attention and MLP biases; every kind of RoPE scaling; vocabularies and sizes that are no multiple of 16;
and, with the name of its family in front, what each of the others adds.

`transformers` is imported where it is needed only: it takes seconds, and worker processes import this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.config import ModelConfig
from models.families import FAMILIES
from models.hf_config import parse_config
from models.weights import expected_tensors

MAX_POSITION = 256

_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# 32 original positions put the small models' wavelengths on either side of both thresholds, and between them
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, dim: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": vocabulary,
    }


SMALL_CONFIGS: dict[str, dict[str, Any]] = {
    "mha": _sizes(64, 96, 2, 4, 4, 16, 96),
    "gqa2": _sizes(64, 128, 2, 4, 2, 16, 100) | {"tie_word_embeddings": True},
    "gqa4_llama3_tied": _sizes(128, 256, 2, 8, 2, 16, 256) | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "gqa8": _sizes(128, 160, 1, 8, 1, 16, 80),
    "mqa_linear": _sizes(96, 112, 2, 6, 1, 16, 90) | {"rope_parameters": _LINEAR},
    "head64_llama3": _sizes(256, 512, 2, 4, 2, 64, 320) | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "head128": _sizes(256, 384, 2, 2, 1, 128, 272),
    "head24_odd_blocks": _sizes(96, 72, 2, 4, 2, 24, 67),
    "head40_llama3_mha": _sizes(80, 100, 1, 2, 2, 40, 55) | {"rope_parameters": _LLAMA3},
    "head8_many": _sizes(64, 64, 2, 8, 4, 8, 48),
    "head_not_derived": _sizes(64, 80, 2, 4, 2, 32, 129),
    "attention_bias": _sizes(64, 96, 2, 4, 2, 16, 97) | {"attention_bias": True, "tie_word_embeddings": True},
    "mlp_bias": _sizes(64, 88, 2, 4, 1, 16, 77) | {"mlp_bias": True},
    "all_biases_linear_head24": _sizes(72, 60, 2, 3, 3, 24, 131)
    | {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LINEAR},
    "ragged_sizes": _sizes(100, 52, 3, 5, 5, 20, 1009),
    "wide_mlp_long_k": _sizes(544, 1056, 1, 4, 2, 64, 33),
    "sixteen_queries": _sizes(112, 1090, 2, 16, 1, 40, 131) | {"attention_bias": True, "mlp_bias": True},
    "head128_bias_tied": _sizes(48, 600, 2, 4, 2, 128, 101)
    | {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "mistral": _sizes(64, 96, 2, 4, 2, 16, 96) | {"model_type": "mistral", "sliding_window": 4096},
    "qwen2_gqa7": _sizes(112, 128, 2, 14, 2, 16, 100) | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _sizes(64, 96, 2, 4, 2, 32, 110) | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_head24_bias": _sizes(72, 100, 2, 6, 2, 24, 99) | {"model_type": "qwen3", "attention_bias": True},
    "qwen3_head128": _sizes(128, 160, 2, 4, 1, 128, 130) | {"model_type": "qwen3", "rope_parameters": _LLAMA3},
    "granite": _sizes(64, 112, 2, 4, 2, 16, 101)
    | {"model_type": "granite", "tie_word_embeddings": True, "embedding_multiplier": 6.0, "attention_multiplier": 0.125}
    | {"residual_multiplier": 0.22, "logits_scaling": 4.0},
    "granite_biases": _sizes(80, 72, 2, 4, 4, 24, 70)
    | {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 12}
    | {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 0.75},
    "qwen3_moe": _sizes(64, 999, 2, 4, 2, 32, 110)
    | {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
    | {"norm_topk_prob": True},
    "olmoe": _sizes(96, 48, 2, 4, 2, 24, 90) | {"model_type": "olmoe", "num_experts": 17, "num_experts_per_tok": 4},
    "mixtral": _sizes(64, 520, 2, 4, 2, 16, 96) | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _sizes(64, 56, 2, 4, 2, 16, 99)
    | {"model_type": "granitemoe", "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    | {"embedding_multiplier": 6.0, "attention_multiplier": 0.125, "residual_multiplier": 0.22, "logits_scaling": 4.0},
}


def small_values(name: str, positions: int = MAX_POSITION) -> dict[str, Any]:
    """The `config.json` of one of `SMALL_CONFIGS`, with a context of `positions`."""
    values = {"model_type": "llama", "rms_norm_eps": 1e-5, **SMALL_CONFIGS[name], "max_position_embeddings": positions}
    return {"architectures": [FAMILIES[values["model_type"]].architecture], **values}


def small_config(name: str, positions: int = MAX_POSITION) -> ModelConfig:
    """One of `SMALL_CONFIGS`, with a context of `positions`."""
    return parse_config(small_values(name, positions))


def random_tensors(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor, in fp32.  Matrices have a standard deviation of 1 / sqrt(K), so that every part of the network shows in
    the logits; norm weights and biases are noise, around 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = noise * shape[1] ** -0.5 if len(shape) == 2 else noise * 0.2 + ("norm" in name)
    return tensors


def make_model(name: str, seed: int = 0) -> Any:
    """A model of transformers in fp32 with random weights, for one of `SMALL_CONFIGS`.

    Matrices are wide enough (standard deviation 1 / sqrt(K)) that every part shows in the logits; norm weights and
    biases are noise, not transformers' ones and zeros, which would hide a missing one.
    """
    import transformers

    options: dict[str, Any] = {
        **SMALL_CONFIGS[name],
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    config = transformers.AutoConfig.for_model(options.pop("model_type", "llama"), **options)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "embed_tokens" not in parameter_name:  # of experts [experts, rows, K]
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 2:
                parameter.copy_(noise * 0.25)  # a tied head's logits then stay below about 10
            else:
                parameter.copy_(noise * 0.2 + ("norm" in parameter_name))
    return model


def save_checkpoint(name: str, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0) -> Path:
    """`make_model(name)` as a checkpoint of `dtype` in `directory`, in shards of at most `shard`."""
    make_model(name, seed).to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


MIXTURES = ("qwen3_moe", "olmoe", "mixtral", "granitemoe")  # of those, the ones with experts
