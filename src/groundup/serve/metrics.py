"""What /metrics tells Prometheus: requests, tokens and waiting times as counted here, and each engine's own numbers."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from groundup.serve.backend import Backend

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """One registry for each application, so that two in one process do not mix."""

    def __init__(self, models: Mapping[str, Backend]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "groundup_requests", "Answers by route and status; 499: the client went away.", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "groundup_request_seconds", "Time to the end of an answer.", ["route"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "groundup_time_to_first_token_seconds", "From a request's arrival to its first token.", ["model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.token_seconds = Histogram(
            "groundup_time_per_output_token_seconds", "Mean time of a response's tokens after the first.", ["model"],
            buckets=_TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "groundup_prompt_tokens", "Tokens of accepted prompts.", ["model"], registry=self.registry
        )
        self.completion_tokens = Counter(
            "groundup_completion_tokens", "Tokens written.", ["model"], registry=self.registry
        )
        self.registry.register(_EngineNumbers(models))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineNumbers(Collector):
    """Read from the engines when Prometheus asks."""

    def __init__(self, models: Mapping[str, Backend]) -> None:
        self._models = {backend.name: backend for backend in models.values()}  # each once, whatever it is called

    def collect(self) -> Iterator[Metric]:
        stats = {name: backend.stats() for name, backend in self._models.items()}
        for field, text in (
            ("active", "Responses that have a slot."),
            ("waiting", "Responses in the queue."),
            ("slots", "Most responses at a time."),
            ("cached_tokens", "Tokens whose keys and values are kept."),
            ("prefilled_tokens", "Prompt tokens computed since the start."),
            ("reused_tokens", "Prompt tokens taken from the prefix cache since the start."),
            ("generated_tokens", "Tokens generated since the start, those of cancelled requests included."),
        ):
            gauge = GaugeMetricFamily(f"groundup_engine_{field}", text, labels=["model"])
            for name, numbers in stats.items():
                gauge.add_metric([name], getattr(numbers, field))
            yield gauge
        healthy = GaugeMetricFamily("groundup_engine_healthy", "1 when the model can answer.", labels=["model"])
        for name, backend in self._models.items():
            healthy.add_metric([name], float(backend.health() is None))
        yield healthy
