"""transformers' own model of a family with tensors of ours, as `from_pretrained` makes it of a checkpoint, without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.config import ModelConfig
from models.hf_config import hf_values


def hf_model(config: ModelConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str) -> Any:
    """The model that transformers makes of a configuration, in `dtype`; its RoPE frequencies stay in fp32."""
    import transformers  # here, because it takes seconds

    values: dict[str, Any] = hf_values(config)
    options = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(options, dtype=dtype).eval()
    state = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tied_embeddings else set())
    model.tie_weights()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model
