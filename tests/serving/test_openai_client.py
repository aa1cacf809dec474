"""The official client against a real server with a real model: what it gets is what the engine says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from megakernel.engine import Engine
from megakernel.loading import load_engine
from megakernel.request import SamplingParams
from megakernel.text import ModelText
from tests.support import BUNDLED
from tests.support.served import Served

QUESTION: list[Any] = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def engine() -> Any:
    with load_engine(BUNDLED, backend="torch", capacity=512) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def text() -> ModelText:
    return ModelText(Path(BUNDLED))


@pytest.fixture(scope="module")
def client(model_server: Served) -> openai.OpenAI:
    return model_server.client()


def by_engine(engine: Engine, text: ModelText, prompt: list[int], count: int, **sampling: Any) -> str:
    """What the engine itself says, without the server."""
    drawn = SamplingParams(stop_token_ids=tuple(engine.config.eos_token_ids), **sampling)
    return text.decode(list(engine.generate(prompt, count, drawn, reuse=False)))


def test_a_chat_is_answered_as_the_engine_answers(client: openai.OpenAI, engine: Engine, text: ModelText) -> None:
    answer = client.chat.completions.create(model="bundled", messages=QUESTION, max_tokens=20)
    [choice] = answer.choices
    prompt = text.encode_chat("What is a list?")
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == by_engine(engine, text, prompt, 20)
    assert answer.usage is not None and answer.model == "bundled" and answer.object == "chat.completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 20)
    assert answer.usage.total_tokens == len(prompt) + 20


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="bundled", messages=QUESTION, max_completion_tokens=20, **more)

    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert all(piece.choices[0].delta.role is None for piece in pieces[1:])
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in pieces)


def test_a_stream_that_was_not_asked_for_its_usage_says_none(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="bundled", messages=QUESTION, max_tokens=3, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_a_completion_of_text_and_of_tokens(client: openai.OpenAI, engine: Engine, text: ModelText) -> None:
    prompt = text.encode("The garbage collector")
    expected = by_engine(engine, text, prompt, 16)
    for asked in ("The garbage collector", prompt):
        answer = client.completions.create(model="bundled", prompt=asked)
        assert answer.choices[0].text.strip() == expected.strip() and answer.object == "text_completion"
    stream = client.completions.create(model="bundled", prompt=prompt, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_several_prompts_and_several_answers(client: openai.OpenAI) -> None:
    alone = [client.completions.create(model="bundled", prompt=prompt).choices[0].text for prompt in ("A list", "A dict")]
    answer = client.completions.create(model="bundled", prompt=["A list", "A dict"], n=2)
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.completion_tokens == 64


def test_draws_differ_by_seed_alone(client: openai.OpenAI, engine: Engine, text: ModelText) -> None:
    def ask(**more: Any) -> list[str | None]:
        asked: Any = {"model": "bundled", "messages": QUESTION, "max_tokens": 12, "temperature": 1.5, "top_p": 0.9} | more
        return [choice.message.content for choice in client.chat.completions.create(**asked).choices]

    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert ask() != ask(), "without a seed each request draws its own"
    three = ask(seed=7, n=3)
    assert three == [*ask(seed=7), *ask(seed=8), *ask(seed=9)] and len(set(three)) == 3
    drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 5, "seed": 3}
    expected = by_engine(engine, text, text.encode_chat("What is a list?"), 12, **drawn)
    assert ask(seed=3, extra_body={"top_k": 5}) == [expected]


def test_streams_of_several_answers_are_told_apart(client: openai.OpenAI) -> None:
    asked: Any = {"model": "bundled", "messages": QUESTION, "max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text(client: openai.OpenAI, stream: bool) -> None:
    whole = client.chat.completions.create(model="bundled", messages=QUESTION, max_tokens=30).choices[0].message.content or ""
    stop = whole[15:19]
    asked: Any = {"model": "bundled", "messages": QUESTION, "max_tokens": 30, "stop": ["never there", stop]}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        [choice] = client.chat.completions.create(**asked).choices
        text, finish = choice.message.content or "", choice.finish_reason
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


def test_the_next_turn_reuses_the_conversation(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "system", "content": "Answer in one line, and be kind to everybody."}, *QUESTION]
    first: Any = client.chat.completions.create(model="bundled", messages=turns, max_tokens=10)
    turns += [first.choices[0].message.model_dump(), {"role": "user", "content": "And a dict?"}]
    second: Any = client.chat.completions.create(model="bundled", messages=turns, max_tokens=5)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is a list?"}]}]
    assert client.chat.completions.create(model="bundled", messages=parts, max_tokens=5).choices


def test_the_models_and_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").owned_by == "llama-megakernel"
    for ask in (lambda: client.models.retrieve("gpt"), lambda: client.completions.create(model="gpt", prompt="a")):
        with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
            ask()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 3}, "temperature"), ({"logprobs": True}, "logprobs"), ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"), ({"max_tokens": 9999}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"), ({"extra_body": {"beam_width": 3}}, "beam_width"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"), ({"n": 100}, "n"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI, more: dict[str, Any], param: str) -> None:
    asked: Any = {"model": "bundled", "messages": QUESTION} | more
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_tokens_and_text(model_server: Served, text: ModelText) -> None:
    http = model_server.http
    told = http.post("/tokenize", json={"prompt": "A list of lists"}).json()
    assert told == {"tokens": text.encode("A list of lists"), "count": len(told["tokens"]), "max_model_len": 512}
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text.decode(told["tokens"])}
    chat = http.post("/tokenize", json={"messages": QUESTION, "model": "bundled"}).json()
    assert chat["tokens"] == text.encode_chat("What is a list?")
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for path, body in (
        ("tokenize", {}),
        ("tokenize", {"prompt": "a", "messages": QUESTION}),
        ("detokenize", {"tokens": [9999]}),
    ):
        assert http.post(f"/{path}", json=body).status_code == 400


def test_metrics_count_what_was_answered(model_server: Served) -> None:
    def value(name: str) -> float:
        lines = model_server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = value("megakernel_generated_tokens_total"), value("megakernel_first_token_seconds_count")
    model_server.client().completions.create(model="bundled", prompt="A list", max_tokens=7)
    assert value("megakernel_generated_tokens_total") == before[0] + 7
    assert value("megakernel_first_token_seconds_count") == before[1] + 1
    assert value("megakernel_cache_capacity") == 512 and value("megakernel_healthy") == 1
    assert value('megakernel_requests_total{path="/v1/completions",status="200"}') >= 1
