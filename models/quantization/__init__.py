"""How checkpoints are quantised, by the `quantization_config` of their config.json; whatever is not read is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.errors import UserError, quoted
from models.quantization import awq, compressed_tensors, gptq
from models.quantization.base import Part, Scheme

__all__ = ["KEYS", "Part", "Scheme", "scheme_of"]

KEYS = ("quantization_config", "compression_config")  # the latter is what older versions of compressed-tensors wrote
METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    module.METHOD: module.scheme_of for module in (compressed_tensors, awq, gptq)
}


def scheme_of(values: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a decoded config.json, None where weights are plain; raises `UserError` for one that is not read."""
    found = [values[key] for key in KEYS if values.get(key) is not None]
    if not found:
        return None
    if len(found) > 1 or not isinstance(found[0], Mapping):
        raise UserError("quantization_config is no object, or there are two of them: take config.json from the model anew")
    method = found[0].get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(
            f"quantization_config: method {quoted(method)} is not supported: use a checkpoint that is not quantised, "
            f"or by one of {', '.join(METHODS)}"
        )
    return METHODS[method](found[0])
