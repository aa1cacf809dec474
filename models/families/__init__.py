"""The families of networks that can be run, one file each; CONTRIBUTING.md says what adding one takes."""

from __future__ import annotations

from models.config import ModelConfig
from models.errors import UserError
from models.families import granite, granitemoe, llama, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe
from models.families.base import Family, Layer

_MODULES = (llama, mistral, qwen2, qwen3, granite, qwen3_moe, olmoe, mixtral, granitemoe)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
# Published shapes, for weights that are made up (`random:<preset>`).
PRESETS: dict[str, ModelConfig] = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}


def family_of(config: ModelConfig) -> Family:
    """The family that a configuration names; raises `UserError` for one that is not supported."""
    if config.family not in FAMILIES:
        raise UserError(f"family {config.family!r} is not supported: use a model of one of {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    if family.layer.experts != (config.num_experts > 0):
        raise UserError(
            f"num_experts is {config.num_experts} in a model of family {config.family!r}: take another configuration"
        )
    return family


def layer_of(config: ModelConfig) -> Layer:
    """What a layer of a model holds."""
    return family_of(config).layer
