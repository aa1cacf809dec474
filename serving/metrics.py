"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.scheduler import Scheduler

FIRST_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
BETWEEN = (0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """Counters of one server, in a registry of their own.  Used by the event loop's thread, but for `fault`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "megakernel_requests", "Requests answered, by path and status", ["path", "status"], registry=registry
        )
        self.first_token = Histogram(
            "megakernel_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self.between = Histogram(
            "megakernel_between_tokens_seconds",
            "Between tokens: of those that come together, their mean",
            buckets=BETWEEN,
            registry=registry,
        )
        self.prompt_tokens = Counter("megakernel_prompt_tokens", "Tokens of prompts", registry=registry)
        self.kept_tokens = Counter("megakernel_kept_tokens", "Tokens of prompts that the cache held already", registry=registry)
        self.tokens = Counter("megakernel_generated_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter("megakernel_cancelled", "Answers whose client left", registry=registry)
        self.faults = Counter("megakernel_faults", "Failures of the engine", registry=registry)

    def watch(self, scheduler: Scheduler, capacity: int) -> None:
        """Gauges of what is true when they are asked for."""
        self._gauge("waiting", "Sequences in the queue", lambda: scheduler.health().waiting)
        self._gauge("running", "Sequences that the engine decodes", lambda: scheduler.health().running)
        self._gauge("cache_tokens", "Tokens in the KV cache of running sequences", scheduler.cache_tokens)
        self._gauge("cache_capacity", "Tokens that the KV cache holds", lambda: capacity)
        self._gauge("healthy", "1 while the engine answers", lambda: scheduler.health().state == "ok")

    def _gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(f"megakernel_{name}", about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
