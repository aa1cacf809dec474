"""transformers' own model of a family with tensors of ours, as `from_pretrained` makes it of a checkpoint, without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.config import ModelConfig
from models.families import layer_of
from models.families.base import layer_module
from models.hf_config import hf_values
from models.stored import experts_names, renamed


def as_transformers_has_them(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names that its modules have: all experts of a layer in one."""
    found = dict(tensors)
    for layer in range(config.num_layers):
        for linear in layer_of(config).linears:
            for name, other in renamed(linear, layer):
                found[other] = found.pop(name)
            if linear.experts:
                names = list(experts_names(config, linear, layer))
                rows = [found.pop(name) for name in names]
                of_one = len(linear.modules)
                each = [torch.cat(rows[start : start + of_one]) for start in range(0, len(rows), of_one)]
                found[layer_module(layer, linear.stacked[-1])] = torch.stack(each)
    return found


def hf_model(config: ModelConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str) -> Any:
    """The model that transformers makes of a configuration, in `dtype`; its RoPE frequencies stay in fp32."""
    import transformers  # here, because it takes seconds

    values: dict[str, Any] = hf_values(config)
    options = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(options, dtype=dtype).eval()
    state = {name: tensor.to(device, dtype) for name, tensor in as_transformers_has_them(config, tensors).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tied_embeddings else set())
    model.tie_weights()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model
