"""transformers' own Llama with tensors of ours, as `from_pretrained` would make it of a checkpoint, without the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.config import ModelConfig


def hf_llama(config: ModelConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str) -> Any:
    """A `LlamaForCausalLM` in `dtype`; its RoPE frequencies stay in fp32."""
    import transformers  # here, because it takes seconds

    rope = config.rope_scaling
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": config.rope_theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    options = transformers.LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_eps,
        rope_parameters=parameters,
        tie_word_embeddings=config.tied_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        max_position_embeddings=config.max_position,
    )
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(options, dtype=dtype).eval()
    state = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tied_embeddings else set())
    model.tie_weights()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model
