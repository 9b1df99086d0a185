"""What the router counts, for Prometheus.

The distances between tokens are counted in plain lists and turned into Prometheus's form only when
somebody looks: observing one costs a bisection. Model names come from clients, so only names that
some worker has served become labels; all others count as `unknown`.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ("UNKNOWN", "Gaps", "Metrics", "ModelMetrics")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)
UNKNOWN = "unknown"


class Gaps:
    """A histogram for the token path."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(GAP_SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one distance between two tokens."""
        self.counts[bisect_left(GAP_SECONDS, seconds)] += 1
        self.total += seconds


class _GapCollector(Collector):
    def __init__(self) -> None:
        self.by_model: dict[str, Gaps] = {}

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(
            "mesh_router_inter_token_seconds",
            "Time between two deltas of a stream",
            labels=["model"],
        )
        for model, gaps in self.by_model.items():
            buckets: list[tuple[str, float]] = []
            running = 0
            for bound, count in zip((*GAP_SECONDS, None), gaps.counts, strict=True):
                running += count
                buckets.append(("+Inf" if bound is None else repr(float(bound)), running))
            family.add_metric([model], buckets, gaps.total)
        yield family


class ModelMetrics:
    """The metrics of one model's label: looking a label up costs more than counting does."""

    def __init__(self, metrics: "Metrics", label: str) -> None:
        self.label = label
        self.gaps = metrics.gaps(label)
        self.in_flight = metrics.in_flight.labels(label)
        self.first_token = metrics.first_token.labels(label)
        self.queue_time = metrics.queue_time.labels(label)
        self.prompt_tokens = metrics.tokens.labels(label, "prompt")
        self.cached_tokens = metrics.tokens.labels(label, "cached")
        self.completion_tokens = metrics.tokens.labels(label, "completion")
        self._metrics = metrics
        self._ends: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        key = (route, status)
        children = self._ends.get(key)
        if children is None:
            children = self._ends[key] = (
                self._metrics.requests.labels(self.label, route, str(status)),
                self._metrics.duration.labels(self.label, route),
            )
        children[0].inc()
        children[1].observe(seconds)


class Metrics:
    """All metrics of one router, in a registry of their own."""

    def __init__(self, knows: Callable[[str], bool], connected: Callable[[], bool]) -> None:
        self._knows = knows
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mesh_router_requests",
            "Requests by their HTTP status (499: the client left first)",
            ["model", "route", "status"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "mesh_router_time_to_first_token_seconds",
            "From the request's arrival to its first delta",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "mesh_router_request_seconds",
            "From the request's arrival to the end of its answer",
            ["model", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_time = Histogram(
            "mesh_router_queue_seconds",
            "Time a request waited on its worker",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "mesh_router_tokens",
            "Tokens by kind: prompt, cached (part of prompt), completion",
            ["model", "kind"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "mesh_router_in_flight",
            "Requests without a complete answer",
            ["model"],
            registry=self.registry,
        )
        Gauge(
            "mesh_router_nats_connected", "Whether NATS is there", registry=self.registry
        ).set_function(lambda: float(connected()))
        Gauge(
            "mesh_router_start_time_seconds", "When this router began", registry=self.registry
        ).set(time.time())
        self._models: dict[str, ModelMetrics] = {}
        self._gaps = _GapCollector()
        self.registry.register(self._gaps)

    def of(self, model: str) -> ModelMetrics:
        """The metrics under a model's label."""
        label = model if self._knows(model) else UNKNOWN
        found = self._models.get(label)
        if found is None:
            found = self._models[label] = ModelMetrics(self, label)
        return found

    def gaps(self, label: str) -> Gaps:
        """The inter-token histogram of a model's label."""
        gaps = self._gaps.by_model.get(label)
        if gaps is None:
            gaps = self._gaps.by_model[label] = Gaps()
        return gaps

    def render(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)
