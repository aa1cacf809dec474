"""From a request's body to jobs of the engine: the model's name, tokens, lengths, sampling.

Templates and tokenizers run in a thread of their own, so that a long prompt delays no answer that streams; short prompts do
not, for a thread costs more time than they do.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from megakernel.engine import check_length, checked_prompt
from megakernel.request import SEED_LIMIT, SamplingParams
from megakernel.text import TextCodec
from models.errors import UserError
from serving.choice import Choice
from serving.errors import ApiError
from serving.inbox import Inbox
from serving.job import Job
from serving.messages import template_messages
from serving.metrics import Metrics
from serving.scheduler import Scheduler
from serving.schema import (
    MOST_CHOICES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
)
from serving.settings import Identity, Limits

SHORT = 8192  # characters, which take a few milliseconds
SLOW = 0.05  # seconds; a template that has taken longer once is never waited for again
COMPLETION_TOKENS = 16  # where a completion does not say how many, as OpenAI has it

T = TypeVar("T")

# To check them anew takes longer than to find them; where no temperature asks for a draw, no seed matters.
sampling_params = lru_cache(SamplingParams)


@dataclass(frozen=True)
class Order:
    """A request that has been queued: its answers, and where their events arrive."""

    request: Generation
    choices: list[Choice]
    inbox: Inbox
    prompt_tokens: int


class Service:
    """One model and its scheduler, as requests see them."""

    def __init__(
        self,
        text: TextCodec,
        scheduler: Scheduler,
        identity: Identity,
        limits: Limits,
        metrics: Metrics,
        sizes: tuple[int, int],
    ) -> None:
        """sizes: tokens of the vocabulary, and of the context."""
        self.text, self.scheduler, self.identity, self.limits, self.metrics = text, scheduler, identity, limits, metrics
        self.vocab_size, self.capacity = sizes
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._slow = False

    def warm(self) -> None:
        """Start what renders conversations, where the model has a template, so that no request waits for it."""
        with suppress(UserError):
            self.text.encode_messages([{"role": "user", "content": "a"}])

    def close(self) -> None:
        self._tokenizing.shutdown(cancel_futures=True)

    async def chat(self, request: ChatRequest, client: str) -> Order:
        """Queue a chat's answer.  Raises ApiError."""
        self.check_model(request.model)
        most = {count for count in (request.max_tokens, request.max_completion_tokens) if count is not None}
        if len(most) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: say one of them", "max_completion_tokens")
        prompt = await self._conversation(request.messages)
        field = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        room = max(1, self.capacity - len(prompt))
        tokens = most.pop() if most else min(room, self.limits.answer_tokens or room)
        return self._order(request, [prompt], tokens, ("messages", field), client)

    async def completion(self, request: CompletionRequest, client: str) -> Order:
        """Queue a completion's answers.  Raises ApiError."""
        self.check_model(request.model)
        if len(request.prompts) * (request.n or 1) > MOST_CHOICES:
            raise ApiError(400, f"prompt: {MOST_CHOICES} answers to a request at most, n to each prompt", "prompt")
        size = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))
        prompts = await self._done("prompt", size, lambda: [self._prompt(prompt) for prompt in request.prompts])
        tokens = request.max_tokens or COMPLETION_TOKENS
        return self._order(request, prompts, tokens, ("prompt", "max_tokens"), client)

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The ids of a text or a conversation.  Raises ApiError."""
        if request.model is not None:
            self.check_model(request.model)
        text, messages = request.prompt, request.messages
        if (text is None) == (messages is None):
            raise ApiError(400, "prompt: give a text as prompt, or a conversation as messages", "prompt")
        if messages is not None:
            return await self._conversation(messages)
        return await self._done("prompt", len(text or ""), lambda: self.text.encode(text or ""))

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """The text of ids.  Raises ApiError."""
        if request.model is not None:
            self.check_model(request.model)
        if not request.tokens:
            return ""
        ids = request.tokens
        return await self._done("tokens", len(ids), lambda: self.text.decode(checked_prompt(ids, self.vocab_size)))

    def check_model(self, name: str) -> None:
        if name != self.identity.model:
            raise ApiError(404, f"no model {name!r} here: this server has {self.identity.model!r}", "model", "model_not_found")

    async def _conversation(self, messages: Sequence[ChatMessage]) -> list[int]:
        turns = template_messages(messages)
        size = sum(len(turn["content"]) for turn in turns)
        began = time.perf_counter()
        ids = await self._done("messages", size, lambda: self.text.encode_messages(turns))
        self._slow = self._slow or (size <= SHORT and time.perf_counter() - began > SLOW)
        return ids

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        return self.text.encode(prompt) if isinstance(prompt, str) else checked_prompt(prompt, self.vocab_size)

    async def _done(self, param: str, size: int, work: Callable[[], T]) -> T:
        """Work on so many characters, what is long in the thread of tokenizers; what it refuses is said of the field."""
        try:
            if size <= SHORT and not self._slow:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except UserError as error:
            raise ApiError(400, f"{param}: {error}", param) from None

    def _order(
        self, request: Generation, prompts: Sequence[list[int]], max_tokens: int, fields: tuple[str, str], client: str
    ) -> Order:
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options: is there for streams only", "stream_options")
        for prompt in prompts:
            self._check_length(len(prompt), max_tokens, fields)
        inbox, seed = Inbox(), random.randrange(SEED_LIMIT) if request.seed is None else request.seed
        who = client if request.user is None else f"user {request.user}"
        jobs = [
            Job(prompt, max_tokens, self._sampling(request, (seed + number) % SEED_LIMIT), who, inbox.put)
            for prompt in prompts
            for number in range(request.n or 1)
        ]
        self.scheduler.submit(jobs)  # the rest is done while the engine reads the prompt
        return Order(request, [Choice(job, self.text, request.stops) for job in jobs], inbox, sum(map(len, prompts)))

    def _check_length(self, prompt: int, max_tokens: int, fields: tuple[str, str]) -> None:
        try:
            check_length(prompt, max_tokens, self.capacity)
        except UserError as error:
            field = fields[prompt < self.capacity]
            raise ApiError(400, f"{field}: {error}", field, "context_length_exceeded") from None

    def _sampling(self, request: Generation, seed: int) -> SamplingParams:
        """The server's, but for what the request says."""
        own = self.identity.sampling
        temperature = own.temperature if request.temperature is None else request.temperature
        top_k = own.top_k if request.top_k is None else request.top_k
        top_p = own.top_p if request.top_p is None else request.top_p
        return sampling_params(temperature, top_k, top_p, seed if temperature else 0, self.identity.end_tokens)
