"""The bodies of requests: what they may hold, and where it must lie.  What is unknown, of another type or out of range is an
`ApiError` that names the field.

Only the form is checked here; whether a prompt fits the context is known later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic_core import from_json

from megakernel.request import SEED_LIMIT
from serving.errors import ApiError
from serving.unbuilt import CHAT, COMPLETION, without_unbuilt

MOST_CHOICES = 16  # answers to one request
MOST_STOPS = 16
LONGEST_STOP = 1024  # characters
MOST_MESSAGES = 4096
MOST_TOKENS = 2**31 - 1


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


Content = StrictStr | Annotated[list[TextPart], Field(min_length=1)]


class Function(Body):
    name: StrictStr
    arguments: StrictStr


class ToolCall(Body):
    id: StrictStr
    type: Literal["function"] = "function"
    function: Function


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: StrictStr | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: StrictStr | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    # What an answer of this API holds beside its text, and holds nothing: an answer may be sent back as it came.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: StrictStr
    name: StrictStr | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[StrictInt, Field(ge=1, le=MOST_TOKENS)]


class Generation(Body):
    """What both ways to generate have in common; None is the server's default."""

    model: StrictStr
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=MOST_TOKENS)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=SEED_LIMIT)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None


Tokens = Annotated[list[StrictInt], Field(min_length=1)]
Prompts = Annotated[list[StrictStr], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]


class CompletionRequest(Generation):
    prompt: StrictStr | Tokens | Prompts

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(Body):
    """A text, or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None


class DetokenizeRequest(Body):
    model: StrictStr | None = None
    tokens: list[StrictInt]


B = TypeVar("B", bound=Body)


def read(body: bytes, kind: type[B]) -> B:
    """The request in a body.  Raises ApiError."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    table = {ChatRequest: CHAT, CompletionRequest: COMPLETION}.get(kind, {})
    fields = without_unbuilt(fields, table)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise refusal(error, fields) from None


def refusal(error: ValidationError, fields: dict[str, Any]) -> ApiError:
    """The first of what pydantic found; of the members of a union the one that came furthest."""
    found = max(error.errors(include_url=False, include_context=False, include_input=False), key=lambda one: len(one["loc"]))
    kinds = {one["type"] for one in error.errors(include_url=False, include_context=False, include_input=False)}
    param = name_of(found["loc"], fields, found["type"] == "missing")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: there is no such parameter", param, "unknown_parameter")
    if found["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param, "missing_required_parameter")
    code = "invalid_type" if any(kind.endswith("_type") for kind in kinds) else "invalid_value"
    return ApiError(400, f"{param}: {found['msg'][:1].lower()}{found['msg'][1:]}", param, code)


def name_of(places: Sequence[str | int], fields: Any, missing: bool) -> str | None:
    """The path of a field as it stands in the request, without the names that pydantic gives the members of a union."""
    name, here = "", fields
    for number, place in enumerate(places):
        last = number == len(places) - 1
        if isinstance(here, dict) and isinstance(place, str) and (place in here or (missing and last)):
            name, here = f"{name}.{place}" if name else place, here.get(place)
        elif isinstance(here, list) and isinstance(place, int) and place < len(here):
            name, here = f"{name}[{place}]", here[place]
    return name or None
