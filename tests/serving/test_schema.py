"""What a request may hold: whatever is unknown, of another type, out of range or not built is refused, by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ApiError
from serving.messages import template_messages
from serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, read
from serving.unbuilt import CHAT, COMPLETION

USER = {"role": "user", "content": "a"}
CHAT_BODY: dict[str, Any] = {"model": "m", "messages": [USER]}
COMPLETION_BODY: dict[str, Any] = {"model": "m", "prompt": "a"}


def refused(body: Any, kind: Any = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert caught.value.status == 400 and str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.5), ("top_p", [1]), ("top_k", -1), ("top_k", 1.5), ("top_k", True),
        ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", "7"),
        ("n", 0), ("n", 17), ("n", 1.5), ("max_tokens", 0), ("max_tokens", -4), ("max_tokens", 2**40), ("max_tokens", "many"),
        ("max_completion_tokens", 0), ("stop", ""), ("stop", 3), ("stop", ["a"] * 17), ("stop", "a" * 1025),
        ("stream", 1), ("stream", "yes"), ("user", 3), ("model", None), ("model", 3),
        ("messages", []), ("messages", "hello"), ("messages", None), ("messages", {"role": "user"}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    error = refused(CHAT_BODY | {name: value})
    assert error.param == name and str(error).startswith(name)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[1].content"),
        ({"content": "a"}, "messages[1]"),
        ({"role": "robot", "content": "a"}, "messages[1]"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}, "messages[1].content[0].more"),
        ({"role": "user", "content": "a", "colour": "red"}, "messages[1].colour"),
        ({"role": "tool", "content": "a"}, "messages[1].tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages[1].refusal"),
        ("hello", "messages[1]"),
    ],
)
def test_a_message_that_is_none_is_named(message: Any, param: str) -> None:
    assert (refused(CHAT_BODY | {"messages": [USER, message]}).param or "").startswith(param)


@pytest.mark.parametrize("body", [CHAT_BODY, COMPLETION_BODY], ids=["chat", "completion"])
def test_what_there_is_not_is_unknown(body: dict[str, Any]) -> None:
    error = refused(body | {"temprature": 1}, ChatRequest if body is CHAT_BODY else CompletionRequest)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_what_is_missing_is_named(missing: str) -> None:
    error = refused({name: value for name, value in CHAT_BODY.items() if name != missing})
    assert (error.param, error.code) == (missing, "missing_required_parameter")


ASKING = [-2, 0.5, 3, "json", {"type": "json_object"}, [{"type": "function"}], ["audio"]]


@pytest.mark.parametrize(("kind", "body", "name"), [(ChatRequest, CHAT_BODY, name) for name in CHAT] + [
    (CompletionRequest, COMPLETION_BODY, name) for name in COMPLETION
])  # fmt: skip
def test_what_is_not_built_is_refused_unless_it_asks_for_nothing(kind: Any, body: dict[str, Any], name: str) -> None:
    for value in ASKING:
        error = refused(body | {name: value}, kind)
        assert (error.param, error.code) == (name, "unsupported_parameter") and "not built" in str(error)
    for value in (None, *(CHAT if kind is ChatRequest else COMPLETION)[name]):
        assert read(json.dumps(body | {name: value}).encode(), kind)


def test_true_is_not_one() -> None:
    assert refused(CHAT_BODY | {"presence_penalty": False}).param == "presence_penalty"
    assert refused(CHAT_BODY | {"logprobs": 0}).param == "logprobs"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b'{"model": "m", "model": NaN}', b"\xff\xfe", b'{"a": ' + b"[" * 10**5, b"[" * 10**5,
     b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}], "top_p": 7}'],
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    refused(body)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, *CHAT, "role", "content", "x"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, ANYTHING, max_size=4), st.sampled_from([ChatRequest, CompletionRequest, TokenizeRequest]))
def test_whatever_is_sent_is_taken_or_refused(fields: dict[str, Any], kind: Any) -> None:
    try:
        read(json.dumps(fields).encode(), kind)
    except ApiError as error:
        assert error.status == 400
        assert set(error.body()["error"]) == {"message", "type", "param", "code"}


def test_turns_become_what_templates_take() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    request = read(json.dumps(CHAT_BODY | {"messages": turns}).encode(), ChatRequest)
    assert template_messages(request.messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(("prompt", "count"), [("a", 1), ([1, 2], 1), (["a", "b"], 2), ([[1], [2, 3], [4]], 3)])
def test_prompts_are_texts_or_tokens_one_or_several(prompt: Any, count: int) -> None:
    assert len(read(json.dumps(COMPLETION_BODY | {"prompt": prompt}).encode(), CompletionRequest).prompts) == count


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, "a"], [1.5], None, {"a": 1}, [["a"]], 7])
def test_prompts_that_are_none(prompt: Any) -> None:
    assert (refused(COMPLETION_BODY | {"prompt": prompt}, CompletionRequest).param or "").startswith("prompt")


def test_tokens_are_integers() -> None:
    assert (refused({"tokens": [1, "a"]}, DetokenizeRequest).param or "").startswith("tokens")
