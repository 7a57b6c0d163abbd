"""Prometheus metrics of the server, in a registry of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from policy_split_jax.serving.service import EngineService

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """Counts requests and tokens of each mode; reads the engine's load when it is asked."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: EngineService):
        self._registry = registry = CollectorRegistry()
        labels = ["mode"]
        self._requests = Counter(
            "policy_split_requests", "Requests that the engine took, by how they ended.", [*labels, "end"],
            registry=registry,
        )  # fmt: skip
        self._prompt = Counter("policy_split_prompt_tokens", "Tokens of prompts.", labels, registry=registry)
        self._made = Counter("policy_split_generated_tokens", "Tokens made.", labels, registry=registry)
        self._first = Histogram(
            "policy_split_first_token_seconds", "From a request to its first token.", labels, buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "policy_split_request_seconds", "From a request to its end.", labels, buckets=_SECONDS, registry=registry
        )
        running = Gauge("policy_split_running", "Rollouts in slots.", registry=registry)
        running.set_function(lambda: service.running)
        waiting = Gauge("policy_split_waiting", "Rollouts without a slot.", registry=registry)
        waiting.set_function(lambda: service.waiting)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    @contextmanager
    def request(self, mode: str, prompt_tokens: int) -> Iterator[Callable[[int], None]]:
        """Counts one request; the function that it gives is told how many tokens have come."""
        start = time.perf_counter()
        self._prompt.labels(mode).inc(prompt_tokens)
        made = 0

        def count(tokens: int) -> None:
            nonlocal made
            if tokens and not made:
                self._first.labels(mode).observe(time.perf_counter() - start)
            made += tokens
            self._made.labels(mode).inc(tokens)

        end = "cut"
        try:
            yield count
            end = "complete"
        finally:
            self._whole.labels(mode).observe(time.perf_counter() - start)
            self._requests.labels(mode, end).inc()
