"""How a model asks to be sampled: what `generation_config.json` says, or the keys of a GGUF file.

The meaning is transformers': without `do_sample` the likeliest token is taken, whatever else stands there. What is not said is
off, also top-k, of which transformers takes 50 then. Whether the numbers can be is said by who samples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError, quoted
from models.files import read_json_object

GENERATION_FILE = "generation_config.json"
# What changes which token is taken, is not known here, and is off with these values (and with null).
_OTHERS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "typical_p": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
}
_GGUF = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
_GGUF_PREFIX = "general.sampling."


@dataclass(frozen=True)
class SamplingDefaults:
    """`values`: of temperature, top_k and top_p those that are asked for; `origin`: what says so, "" where nothing does;
    `ignored`: what else is asked for, in words."""

    values: Mapping[str, float | int]
    origin: str = ""
    ignored: tuple[str, ...] = ()


NOTHING = SamplingDefaults({})


def of_directory(directory: Path) -> SamplingDefaults:
    """Of a model in Hugging Face's layout. Raises `UserError` that names the file."""
    path = directory / GENERATION_FILE
    if not os.path.exists(path):
        return NOTHING
    try:
        return _read(read_json_object(path), GENERATION_FILE)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def of_gguf(path: Path, values: Mapping[str, Any]) -> SamplingDefaults:
    """Of a model in GGUF, by its keys: what names a temperature is to be sampled. Raises `UserError` that names the file."""
    named = {name: values[_GGUF_PREFIX + key] for key, name in _GGUF.items() if _GGUF_PREFIX + key in values}
    try:
        return _read({**named, "do_sample": "temperature" in named}, path.name)
    except UserError as error:
        raise UserError(f"{path}: {_GGUF_PREFIX}{error}") from None


def _read(values: Mapping[str, Any], origin: str) -> SamplingDefaults:
    ignored = tuple(
        f"{name} {value}"
        for name, neutral in _OTHERS.items()
        if isinstance(value := values.get(name), int | float) and value not in neutral
    )
    sample = values.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise UserError(f"do_sample is {quoted(sample)}: it must be true or false")
    if not sample:
        return SamplingDefaults({}, origin if ignored else "", ignored)
    found = {"temperature": _number(values, "temperature", 1.0), "top_p": _number(values, "top_p", 1.0)}
    top_k = values.get("top_k")
    if top_k is not None and (type(top_k) is not int):
        raise UserError(f"top_k is {quoted(top_k)}: it must be an integer")
    return SamplingDefaults({**found, "top_k": top_k or 0}, origin, ignored)


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise UserError(f"{name} is {quoted(value)}: it must be a number")
    return value
