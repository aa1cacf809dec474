"""A conversation as the API writes it, made into what chat templates take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megakernel.chat_template import Message
from serving.schema import AssistantMessage, ChatMessage, Content, ToolCall, ToolMessage


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Roles and text; parts are joined by line breaks, `developer` is `system`, as templates know it."""
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> Message:
    written: Message = {"role": "system" if message.role == "developer" else message.role, "content": _text(message.content)}
    if message.name is not None:
        written["name"] = message.name
    if isinstance(message, ToolMessage):
        written["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        written["tool_calls"] = [_call(call) for call in message.tool_calls]
    return written


def _text(content: Content | None) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments themselves: they take an object, where the API has its JSON."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
