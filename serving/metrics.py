"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.scheduler import Scheduler

FIRST_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
BETWEEN = (0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """Counters of one server, in a registry of their own.  Used by the event loop's thread, but for `fault`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = {"registry": self.registry}
        self.requests = Counter("megakernel_requests", "Requests answered, by path and status", ["path", "status"], **to)
        self.first_token = Histogram(
            "megakernel_first_token_seconds", "From a request's arrival to its first token", buckets=FIRST_TOKEN, **to
        )
        self.between = Histogram(
            "megakernel_between_tokens_seconds",
            "Between tokens: of those that come together, their mean",
            buckets=BETWEEN,
            **to,
        )
        self.prompt_tokens = Counter("megakernel_prompt_tokens", "Tokens of prompts", **to)
        self.kept_tokens = Counter("megakernel_kept_tokens", "Tokens of prompts that the cache held already", **to)
        self.tokens = Counter("megakernel_generated_tokens", "Tokens generated", **to)
        self.cancelled = Counter("megakernel_cancelled", "Answers whose client left", **to)
        self.faults = Counter("megakernel_faults", "Failures of the engine", **to)

    def watch(self, scheduler: Scheduler, capacity: int) -> None:
        """Gauges of what is true when they are asked for."""
        to = {"registry": self.registry}
        Gauge("megakernel_waiting", "Sequences in the queue", **to).set_function(lambda: scheduler.health().waiting)
        Gauge("megakernel_running", "Sequences that the engine decodes", **to).set_function(lambda: scheduler.health().running)
        Gauge("megakernel_cache_tokens", "Tokens in the KV cache of running sequences", **to).set_function(
            scheduler.cache_tokens
        )
        Gauge("megakernel_cache_capacity", "Tokens that the KV cache holds", **to).set(capacity)
        Gauge("megakernel_healthy", "1 while the engine answers", **to).set_function(lambda: scheduler.health().state == "ok")

    def text(self) -> bytes:
        return generate_latest(self.registry)
