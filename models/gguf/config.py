"""llama.cpp's spelling of a configuration, turned into Hugging Face's: what `models.hf_config` reads.

Which architectures there are, what their keys are called and how their tensors are named and ordered stands here and nowhere
else; whether a family is supported, and whether its sizes make a network, is said by those who read the result.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what the converter does to tensors and to the frequencies of
RoPE: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import LEAST_FLOAT, MOST_FLOAT, RopeScaling
from models.errors import UserError, quoted
from models.gguf.rope_factors import scaling_of

ROPE_FACTORS = "rope_freqs.weight"
NO_TOKEN = 2**32 - 1  # how -1 is written, which stands for none


@dataclass(frozen=True)
class Architecture:
    """`halves` says that the rows of q and k, which RoPE turns in pairs, stand pair by pair in the file, where Hugging Face has
    the first of all pairs and then the second. `biases`: Hugging Face's keys that say whether there are any, where the family
    does not say so itself. `multipliers`: numbers of this family alone, key of the file to Hugging Face's."""

    model_type: str
    class_name: str
    halves: bool
    biases: tuple[str, ...]
    multipliers: Mapping[str, str]


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", True, ("attention_bias", "mlp_bias"), {}),
    "mistral": Architecture("mistral", "MistralForCausalLM", True, (), {}),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", False, (), {}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False, ("attention_bias",), {}),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        True,
        ("attention_bias", "mlp_bias"),
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
}
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
# Tokens that end a turn or a document by their text alone, as llama.cpp takes them: a file names one id, models have several.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_role|>")
CONTROL = 3  # the type of a token that is no text


def hf_name(name: str) -> str | None:
    """What Hugging Face calls a tensor, None for one that it does not know."""
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _GLOBAL_NAMES.get(name)
    module = _MODULES.get(match[2])
    return None if module is None else f"model.layers.{match[1]}.{module}.{match[3]}"


def architecture_of(values: Mapping[str, Any]) -> Architecture:
    """Raises `UserError` for one that is not known here."""
    name = values.get("general.architecture")
    if name is None:
        raise UserError("general.architecture is missing: it is no language model, take another file")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"architecture {quoted(name)} is not supported: use a model of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def hf_config(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: Callable[[], np.ndarray]
) -> dict[str, Any]:
    """A decoded `config.json` that says what a file's keys say.

    shapes: of the file's tensors, by their names there; rope_factors: called where there is a tensor of them.

    Raises `UserError` for an architecture, a key or a tensor that cannot be understood.
    """
    architecture = architecture_of(values)
    keys = _Keys(values)
    hidden, heads = keys.integer("embedding_length"), keys.per_layer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // heads if heads > 0 else 0)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{keys.name('attention.value_length')} is not the key's length: use a model in which they are equal")
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError("tensor token_embd.weight is missing: download the model anew, with all its parts")
    theta = keys.number("rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": hidden,
        "intermediate_size": keys.per_layer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.per_layer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding[0],
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, shapes, theta, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": _token_id(values, "bos"),
        "eos_token_id": _end_tokens(values),
    }
    for bias in architecture.biases:
        config[bias] = _BIASES[bias] in shapes
    if (turned := keys.integer("rope.dimension_count", head_dim)) != head_dim and head_dim > 0:
        config["partial_rotary_factor"] = turned / head_dim
    if experts := keys.integer("expert_count", 0):
        config["num_local_experts"] = experts
    # None where there is none, or Mistral's configuration would take its default for a window
    config["sliding_window"] = keys.integer("attention.sliding_window", 0) or None
    for key, name in architecture.multipliers.items():
        if keys.given(key):
            config[name] = keys.number(key)
    return config


def _rope_scaling(
    keys: _Keys,
    shapes: Mapping[str, tuple[int, ...]],
    theta: float,
    head_dim: int,
    rope_factors: Callable[[], np.ndarray],
) -> dict[str, Any] | None:
    """By the tensor of factors, which is how Llama 3's scaling is kept, else by the keys."""
    kind = keys.values.get(keys.name("rope.scaling.type"), "none")
    if not isinstance(kind, str):
        raise UserError(f"{keys.name('rope.scaling.type')} is {shown(kind)}: it must be a text")
    if kind not in ("none", ""):
        scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor", 1.0)}
    elif (factor := keys.number("rope.scale_linear", 1.0)) != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    else:
        scaling = {}
    if ROPE_FACTORS not in shapes:
        return scaling or None
    if scaling:
        raise UserError(f"{ROPE_FACTORS} stands beside {keys.name('rope.scaling.type')} {kind!r}: use a model with one of them")
    found = _understood(rope_factors(), theta, head_dim)
    if found.kind == "default":
        return None
    return {
        "rope_type": found.kind,
        "factor": found.factor,
        "low_freq_factor": found.low_freq_factor,
        "high_freq_factor": found.high_freq_factor,
        "original_max_position_embeddings": found.original_max_position,
    }


def _understood(factors: np.ndarray, theta: float, head_dim: int) -> RopeScaling:
    if head_dim < 2 or factors.shape != (head_dim // 2,) or not LEAST_FLOAT <= theta <= MOST_FLOAT:
        raise UserError(f"{ROPE_FACTORS} has shape {list(factors.shape)}, heads of {head_dim} need {[head_dim // 2]}")
    found = scaling_of(factors, theta, head_dim)
    if found is None:
        raise UserError(f"{ROPE_FACTORS} holds factors that are not those of Llama 3's scaling: use another model")
    return found


def _end_tokens(values: Mapping[str, Any]) -> list[int]:
    """The end tokens that a file names, and those that are ends by their text."""
    named = [_token_id(values, key) for key in ("eos", "eot", "eom")]
    tokens, types = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, np.ndarray) and len(tokens) == len(types):
        places = np.flatnonzero(types == CONTROL)
        named += sorted(int(place) for place in places if tokens[place] in _ENDS)
    return list(dict.fromkeys(token for token in named if token is not None))


def _token_id(values: Mapping[str, Any], which: str) -> int | None:
    token = values.get(f"tokenizer.ggml.{which}_token_id")
    if token is not None and type(token) is not int:
        raise UserError(f"tokenizer.ggml.{which}_token_id is {shown(token)}: it must be an integer")
    return None if token == NO_TOKEN else token


class _Keys:
    """The keys of one architecture, by what follows its name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self._prefix = values, values["general.architecture"]

    def name(self, key: str) -> str:
        return f"{self._prefix}.{key}"

    def given(self, key: str) -> bool:
        return self.name(key) in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise UserError(f"{self.name(key)} is {shown(value)}: it must be an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise UserError(f"{self.name(key)} is {shown(value)}: it must be a number")
        return value

    def per_layer(self, key: str, default: int | None = None) -> int:
        """One integer, or a list with one for each layer, all equal."""
        value = self._value(key, default)
        if not isinstance(value, np.ndarray):
            return self.integer(key, default)
        if value.dtype.kind not in "iu" or len(set(value.tolist())) != 1:
            raise UserError(f"{self.name(key)} differs between layers: use a model whose layers are alike")
        return int(value[0])

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(self.name(key), default)
        if value is None:
            raise UserError(f"{self.name(key)} is missing: take the file from a sound model")
        return value


def shown(value: Any) -> str:
    """A key's value in a message."""
    return "a list" if isinstance(value, list | np.ndarray) else quoted(value)
