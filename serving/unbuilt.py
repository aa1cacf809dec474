"""What clients may send that this server knows of and does not have: refused, unless it asks for nothing.

Nothing is ignored in silence: a value that changes nothing passes, any other is an error that names its field.
"""

from __future__ import annotations

from typing import Any

from serving.errors import not_built

# name: the values that ask for nothing, beside null
_BOTH: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "repetition_penalty": (1,),
    "safety_identifier": (),
    "stop_token_ids": ([],),
}
CHAT: dict[str, tuple[Any, ...]] = _BOTH | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # says something of tools only
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
COMPLETION: dict[str, tuple[Any, ...]] = _BOTH | {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}


def without_unbuilt(fields: dict[str, Any], table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The request without fields of the table that ask for nothing; raises ApiError for one that asks for something."""
    for name in fields.keys() & table.keys():
        value = fields[name]
        if value is not None and not any(_same(value, neutral) for neutral in table[name]):
            raise not_built(name)
    return {name: value for name, value in fields.items() if name not in table}


def _same(value: Any, neutral: Any) -> bool:
    """Equal, where true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
