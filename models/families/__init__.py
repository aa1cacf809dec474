"""The families of networks that can be run, one file each; CONTRIBUTING.md says what adding one takes."""

from __future__ import annotations

from models.config import ModelConfig
from models.errors import UserError
from models.families import granite, llama, mistral, qwen2, qwen3
from models.families.base import Family, Layer

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, granite)}
# Published shapes, for weights that are made up (`random:<preset>`).
PRESETS: dict[str, ModelConfig] = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}


def family_of(config: ModelConfig) -> Family:
    """The family that a configuration names; raises `UserError` for one that is not supported."""
    if config.family not in FAMILIES:
        raise UserError(f"family {config.family!r} is not supported: use a model of one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def layer_of(config: ModelConfig) -> Layer:
    """What a layer of a model holds."""
    return family_of(config).layer
