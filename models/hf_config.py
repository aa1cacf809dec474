"""Hugging Face's spelling of a configuration, of transformers 4 and 5 alike, read into a `ModelConfig`.

The only place that reads these names; others only write them. What is peculiar to a family stands in its file
(`models.families`). What its class of transformers computes differently, or what another architecture adds, is refused by
name here; whether the sizes make a network is checked by `ModelConfig` itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ROPE_KINDS, TOKEN_LIMIT, ModelConfig, RopeScaling
from models.errors import UserError, quoted
from models.families import FAMILIES, family_of
from models.families.base import Family
from models.files import json_kind, read_json_object
from models.quantization import scheme_of

DTYPES = ("bfloat16", "float16", "float32")

# Keys that change what is computed, with the only values under which nothing changes (absent and null are neutral too);
# a family that reads or ignores one of them says so.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "use_mrope": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_NULL_MEANS_NONE = ("bos_token_id", "eos_token_id", "num_key_value_heads", "head_dim", "sliding_window")
_NEUTRAL_ROPE: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1, 1.0), "mrope_section": ()}


def read_config(path: Path) -> ModelConfig:
    """The configuration in a `config.json`, or in the directory that holds it. Raises `UserError` that names the
    file."""
    path = path / "config.json" if os.path.isdir(path) else path
    values = read_json_object(path)
    end_tokens = _generation_end_tokens(path.with_name("generation_config.json"))
    try:
        return parse_config(values, end_tokens)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_config(values: Mapping[str, Any], end_tokens: tuple[int, ...] | None = None) -> ModelConfig:
    """A decoded `config.json`; `end_tokens`, when given, replace its own, as generation in transformers has it.

    Keys that are absent or null take the defaults of transformers' own configuration; a token id that is null is none.
    Raises `UserError`.
    """
    family = _find_family(values)
    values = {**family.defaults} | {key: value for key, value in values.items() if value is not None or key in _NULL_MEANS_NONE}
    _check_neutral("", values, {key: allowed for key, allowed in _NEUTRAL.items() if key not in _keys_read(family)})
    _check_dtype(values)
    scheme_of(values)  # refuses what is not read
    hidden, heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
    max_position = _integer(values, "max_position_embeddings")
    _check_window(family, values, max_position)
    theta, scaling = _rope(values, max_position, family.theta)
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=_integer(values, _size_key(family, values, "intermediate_size")),
        num_layers=_integer(values, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(values, "num_key_value_heads", heads),
        head_dim=_derived(hidden, heads) if values.get("head_dim") is None else _integer(values, "head_dim"),
        vocab_size=_integer(values, "vocab_size"),
        rms_eps=_number(values, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=_boolean(values, "tie_word_embeddings"),
        family=family.name,
        max_position=max_position,
        bos_token_id=next(iter(_token_ids(values.get("bos_token_id"), "bos_token_id")), None),
        eos_token_ids=_token_ids(values.get("eos_token_id")) if end_tokens is None else end_tokens,
        **_own_properties(family, values),
    )


def hf_values(config: ModelConfig) -> dict[str, object]:
    """A `config.json` that `parse_config` reads back as `config`."""
    family = family_of(config)
    rope = config.rope_scaling
    parameters: dict[str, object] = {"rope_type": rope.kind, "rope_theta": config.rope_theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
        parameters["original_max_position_embeddings"] = rope.original_max_position
    values: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": parameters,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_position,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    values |= {keys[0]: getattr(config, name) for name, keys in family.sizes.items()}
    values |= {key: getattr(config, names[0]) for key, names in family.booleans.items()}
    values |= {key: getattr(config, name) for key, name in family.numbers.items()}
    if "attention_multiplier" in values:
        values["attention_multiplier"] = config.attention_scale  # written out, also where it is that of other families
    if family.window_switch is not None:
        values["sliding_window"] = None
    return values


def _find_family(values: Mapping[str, Any]) -> Family:
    """By `model_type`, or, where there is none, by `architectures`; if both are there they must agree."""
    kind, architectures = values.get("model_type"), values.get("architectures")
    if kind is None:
        found = [family for family in FAMILIES.values() if architectures == [family.architecture]]
        if not found:
            name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
            supported = ", ".join(family.architecture for family in FAMILIES.values())
            raise UserError(f"architecture {quoted(name)} is not supported: use a model of one of {supported}")
        return found[0]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type {quoted(kind)} is not supported: use a model of one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if architectures is not None and architectures != [family.architecture]:
        raise UserError(
            f"architecture {quoted(architectures)} of model_type {kind!r} is not supported: use a model whose architectures "
            f"are [{family.architecture!r}]"
        )
    return family


def _keys_read(family: Family) -> set[str]:
    """Keys of `_NEUTRAL` that a family reads, or need not."""
    window = () if family.window_switch is None else ("sliding_window", family.window_switch)
    sizes = {key for keys in family.sizes.values() for key in keys}
    return {*family.booleans, *family.numbers, *sizes, *family.ignored, *window}


def _size_key(family: Family, values: Mapping[str, Any], name: str) -> str:
    """The key that holds an integer property: of those that a family has for it the first that is there."""
    keys = family.sizes.get(name, (name,))
    return next((key for key in keys if values.get(key) is not None), keys[0])


def _own_properties(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Properties of `ModelConfig` that only some families set."""
    booleans = {name: _boolean(values, key) for key, names in family.booleans.items() for name in names}
    numbers = {name: _number(values, key) for key, name in family.numbers.items()}
    counts = {name: _integer(values, _size_key(family, values, name)) for name in family.sizes if name != "intermediate_size"}
    return {**family.fixed, **booleans, **numbers, **counts}


def _check_window(family: Family, values: Mapping[str, Any], max_position: int) -> None:
    """Refuse layers that attend to less than the context: a sliding window that it could exceed, or another kind of layer."""
    switched_on = family.window_switch == "" or (family.window_switch is not None and _boolean(values, family.window_switch))
    window = _integer(values, "sliding_window") if switched_on and values.get("sliding_window") is not None else None
    if window is not None and window < max_position:
        raise UserError(
            f"sliding_window = {window} is less than max_position_embeddings = {max_position}, and attention to a part of the "
            f"context is not supported: set max_position_embeddings to {window}"
        )
    kinds = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    layer_types = values.get("layer_types")
    for kind in layer_types if isinstance(layer_types, list) else [] if layer_types is None else [layer_types]:
        if kind not in kinds:
            raise UserError(f"layer_types holds {quoted(kind)}, which is not supported: use a model of full_attention layers")


def _check_neutral(where: str, values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in neutral.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            mend = f"use a model with {allowed[0]!r}" if allowed else "use a model without it"
            shown = "" if isinstance(value, (dict, list)) else f" = {quoted(value)}"
            raise UserError(f"{where}{key}{shown} is not supported: {mend}")


def _check_dtype(values: Mapping[str, Any]) -> None:
    for key in ("torch_dtype", "dtype"):  # transformers 4, 5
        dtype = values.get(key)
        if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
            raise UserError(f"{key} {dtype!r} is not supported: use a checkpoint in {', '.join(DTYPES)}")


def _rope(values: Mapping[str, Any], max_position: int, default: float) -> tuple[float, RopeScaling]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    for key, parameters in (("rope_scaling", old), ("rope_parameters", new)):
        if parameters is not None and not isinstance(parameters, Mapping):
            raise UserError(f"{key} is {json_kind(parameters)}: it must be an object or null")
    if old and new and old != new:
        raise UserError("rope_scaling and rope_parameters contradict each other: keep only one of them")
    key = "rope_scaling" if old else "rope_parameters"
    parameters = old or new or {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            raise UserError(f"{key}.{name}: RoPE parameters by layer type are not supported, use a model with one set")
    _check_neutral(f"{key}.", parameters, _NEUTRAL_ROPE)
    theta = _number(values, "rope_theta", default)
    inner_theta = _number(parameters, "rope_theta", theta, key)
    if values.get("rope_theta") is not None and inner_theta != theta:
        raise UserError(f"rope_theta is {theta} but {key}.rope_theta is {inner_theta}: keep only one of them")
    return inner_theta, _rope_scaling(key, parameters, max_position)


def _rope_scaling(key: str, parameters: Mapping[str, Any], max_position: int) -> RopeScaling:
    kind = parameters.get("rope_type", parameters.get("type", "default"))  # "type" before transformers 4.45
    if kind not in ROPE_KINDS:
        raise UserError(f"{key}: rope type {kind!r} is not supported, use a model with one of {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return RopeScaling()
    factor = _number(parameters, "factor", None, key)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=_number(parameters, "low_freq_factor", None, key),
        high_freq_factor=_number(parameters, "high_freq_factor", None, key),
        original_max_position=_integer(parameters, "original_max_position_embeddings", max_position, where=key),
    )


def _derived(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is no multiple of {heads} heads: head_dim must be given")
    return hidden // heads


def _generation_end_tokens(path: Path) -> tuple[int, ...] | None:
    """The end tokens of a `generation_config.json`, None when there is no such file or it names none."""
    tokens = read_json_object(path).get("eos_token_id") if os.path.exists(path) else None
    try:
        return None if tokens is None else _token_ids(tokens)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _token_ids(value: Any, key: str = "eos_token_id") -> tuple[int, ...]:
    """One id, a list of ids, or null for none; each once."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    tokens = dict.fromkeys(_integer({key: token}, key, least=0) for token in ids)
    for token in tokens:
        if token >= TOKEN_LIMIT:
            raise UserError(f"{key} is {quoted(token)}: it must be an integer from 0 to {TOKEN_LIMIT - 1}")
    return tuple(tokens)


def _integer(values: Mapping[str, Any], key: str, default: int | None = None, where: str = "", least: int = 1) -> int:
    value = values.get(key) if values.get(key) is not None else default
    name = f"{where}.{key}" if where else key
    if value is None:
        raise UserError(f"{name} is missing: add it, an integer")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {quoted(value)}: it must be an integer of at least {least}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None, where: str = "") -> float:
    """Any number; `ModelConfig` and `RopeScaling` refuse those that are not finite or not positive."""
    value = values.get(key) if values.get(key) is not None else default
    name = f"{where}.{key}" if where else key
    if value is None:
        raise UserError(f"{name} is missing: add it, a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} is {value!r}: it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name} is too large: it must be a finite number") from None


def _boolean(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key} is {value!r}: it must be true or false")
    return bool(value)
