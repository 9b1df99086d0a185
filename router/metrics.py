"""What the router counts, for Prometheus.

Counted in plain numbers on the one thread there is, and turned into Prometheus's form only when
somebody looks: its own classes take a lock for each count, which a request felt. Model names come
from clients, so only names that some worker has served become labels; all others count as
`unknown`.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router.breakers import Breakers
from router.retrying import RetryBudget
from shared.wish import Wish

__all__ = ("UNKNOWN", "Distribution", "Dropped", "Metrics", "ModelMetrics", "Tasks")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)
UNKNOWN = "unknown"


class Distribution:
    """A histogram of seconds; observing costs a bisection."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Show it under these labels."""
        buckets: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound is None else repr(float(bound)), running))
        family.add_metric(labels, buckets, self._total)


class Dropped(NamedTuple):
    """What came in from NATS and was not used."""

    messages: Mapping[str, int]
    """By what was wrong with them."""
    strays: int
    workers: Mapping[str, int]
    """Messages that a worker has dropped, as it says."""


class Tasks(NamedTuple):
    """Of event loops."""

    here: int
    workers: Mapping[str, int]
    """As they say."""


class ModelMetrics:
    """What is counted under one model's label."""

    __slots__ = (
        "accepted_tokens",
        "cached_tokens",
        "completion_tokens",
        "drafted_tokens",
        "durations",
        "first_token",
        "gaps",
        "in_flight",
        "prompt_tokens",
        "queue_time",
        "requests",
        "resumes",
    )

    def __init__(self) -> None:
        self.in_flight = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.first_token = Distribution()
        self.queue_time = Distribution()
        self.gaps = Distribution(GAP_SECONDS)
        self.durations: defaultdict[str, Distribution] = defaultdict(Distribution)
        """By route."""
        self.requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        """By route and status."""
        self.resumes: defaultdict[str, int] = defaultdict(int)
        """By reason."""

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self.requests[route, status] += 1
        self.durations[route].observe(seconds)


class Metrics(Collector):
    """All metrics of one router, in a registry of their own."""

    def __init__(
        self,
        knows: Callable[[str], bool],
        connected: Callable[[], bool],
        held: Callable[[], Mapping[str, int]] = dict,
        wishes: Callable[[], Wish | None] = lambda: Wish({}, 0),
        dropped: Callable[[], Dropped] = lambda: Dropped({}, 0, {}),
        tasks: Callable[[], Tasks] = lambda: Tasks(0, {}),
        retries: RetryBudget | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        self._knows = knows
        self._connected = connected
        self._held = held
        self._wishes = wishes
        self._dropped = dropped
        self._tasks = tasks
        self._retries = retries
        self._breakers = breakers
        self.repeats: defaultdict[str, int] = defaultdict(int)
        """Requests that came with the Idempotency-Key of another, by what became of them."""
        self._started = time.time()
        self._models: defaultdict[str, ModelMetrics] = defaultdict(ModelMetrics)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def of(self, model: str) -> ModelMetrics:
        """The metrics under a model's label."""
        return self._models[model if self._knows(model) else UNKNOWN]

    def other(self, route: str, status: int) -> None:
        """Count a request that was answered without a model."""
        self._models[UNKNOWN].requests[route, status] += 1

    def render(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Everything, as of now."""
        yield from self._counters()
        yield from self._distributions()
        in_flight = GaugeMetricFamily(
            "mesh_router_in_flight", "Requests without a complete answer", labels=["model"]
        )
        for name, model in self._models.items():
            in_flight.add_metric([name], model.in_flight)
        yield in_flight
        held = GaugeMetricFamily(
            "mesh_router_held", "Requests that wait for a model to be brought up", labels=["model"]
        )
        for name, count in self._held().items():
            held.add_metric([name], count)
        yield held
        yield from self._wanted()
        yield from self._rejected()
        yield from self._failing()
        yield from self._repeated()
        yield from self._running()
        yield GaugeMetricFamily(
            "mesh_router_nats_connected", "Whether NATS is there", value=float(self._connected())
        )
        yield GaugeMetricFamily(
            "mesh_router_start_time_seconds", "When this router began", value=self._started
        )

    def _wanted(self) -> Iterable[Metric]:
        wish = self._wishes()
        if wish is None:
            # Nothing is better than a 0 on which somebody would take all workers away.
            return
        replicas = GaugeMetricFamily(
            "mesh_wanted_replicas", "Workers that should serve a model", labels=["model"]
        )
        for name, count in wish.by_model.items():
            replicas.add_metric([name], count)
        yield replicas
        yield GaugeMetricFamily(
            "mesh_wanted_workers",
            "Workers that should be there, by the memory of those that are",
            value=wish.workers,
        )

    def _failing(self) -> Iterable[Metric]:
        if (budget := self._retries) is not None:
            retries = CounterMetricFamily(
                "mesh_router_retries",
                "Tries anew before the first token; refused: the budget was used up",
                labels=["outcome"],
            )
            retries.add_metric(["made"], budget.made)
            retries.add_metric(["refused"], budget.refused)
            yield retries
        if (breakers := self._breakers) is not None:
            states = GaugeMetricFamily(
                "mesh_router_breaker_open",
                "Workers that fail again and again: 1 while left alone, 0.5 while tried",
                labels=["worker"],
            )
            for worker, state in breakers.states().items():
                states.add_metric([worker], 1.0 if state == "open" else 0.5)
            yield states
            yield CounterMetricFamily(
                "mesh_router_breakers_opened",
                "How often a worker began to be left alone",
                value=breakers.opened,
            )

    def _rejected(self) -> Iterable[Metric]:
        dropped = self._dropped()
        messages = CounterMetricFamily(
            "mesh_dropped_messages",
            "Messages from NATS that this router could not read, or that spoke in another's name",
            labels=["kind"],
        )
        for kind, count in dropped.messages.items():
            messages.add_metric([kind], count)
        yield messages
        yield CounterMetricFamily(
            "mesh_stray_frames",
            "Frames of attempts that this router does not wait for (any more)",
            value=dropped.strays,
        )
        workers = CounterMetricFamily(
            "mesh_worker_dropped_messages",
            "Messages from NATS that a worker could not use, as it tells",
            labels=["worker"],
        )
        for worker, count in dropped.workers.items():
            workers.add_metric([worker], count)
        yield workers

    def _running(self) -> Iterable[Metric]:
        tasks = self._tasks()
        yield GaugeMetricFamily(
            "mesh_router_tasks", "Tasks of this router's event loop", value=tasks.here
        )
        workers = GaugeMetricFamily(
            "mesh_worker_tasks", "Tasks of a worker's event loop, as it tells", labels=["worker"]
        )
        for worker, count in tasks.workers.items():
            workers.add_metric([worker], count)
        yield workers

    def _repeated(self) -> Iterable[Metric]:
        repeats = CounterMetricFamily(
            "mesh_router_repeats",
            "Requests with a known Idempotency-Key: joined, repeated, or reused for another",
            labels=["outcome"],
        )
        for outcome in ("joined", "repeated", "reused"):
            repeats.add_metric([outcome], self.repeats[outcome])
        yield repeats

    def _counters(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "mesh_router_requests",
            "Requests by their HTTP status (499: the client left first)",
            labels=["model", "route", "status"],
        )
        tokens = CounterMetricFamily(
            "mesh_router_tokens",
            "Tokens by kind: prompt, cached (part of prompt), completion",
            labels=["model", "kind"],
        )
        # Not the router's own work: their names are of the mesh.
        cached = CounterMetricFamily(
            "mesh_cached_prompt_tokens", "Prompt tokens whose KV was reused", labels=["model"]
        )
        drafted = CounterMetricFamily(
            "mesh_drafted_tokens", "Tokens drafted and verified", labels=["model"]
        )
        accepted = CounterMetricFamily(
            "mesh_accepted_tokens", "Drafted tokens that became part of answers", labels=["model"]
        )
        resumes = CounterMetricFamily(
            "mesh_resumes",
            "Requests that went on on another attempt, by what ended the one before",
            labels=["model", "reason"],
        )
        for name, model in self._models.items():
            for reason, count in model.resumes.items():
                resumes.add_metric([name, reason], count)
            cached.add_metric([name], model.cached_tokens)
            drafted.add_metric([name], model.drafted_tokens)
            accepted.add_metric([name], model.accepted_tokens)
            for (route, status), count in model.requests.items():
                requests.add_metric([name, route, str(status)], count)
            tokens.add_metric([name, "prompt"], model.prompt_tokens)
            tokens.add_metric([name, "cached"], model.cached_tokens)
            tokens.add_metric([name, "completion"], model.completion_tokens)
        return requests, tokens, cached, drafted, accepted, resumes

    def _distributions(self) -> Iterable[Metric]:
        first_token = HistogramMetricFamily(
            "mesh_router_time_to_first_token_seconds",
            "From the request's arrival to its first delta",
            labels=["model"],
        )
        gaps = HistogramMetricFamily(
            "mesh_router_inter_token_seconds",
            "Time between two deltas of a stream",
            labels=["model"],
        )
        queue_time = HistogramMetricFamily(
            "mesh_router_queue_seconds", "Time a request waited on its worker", labels=["model"]
        )
        durations = HistogramMetricFamily(
            "mesh_router_request_seconds",
            "From the request's arrival to the end of its answer",
            labels=["model", "route"],
        )
        for name, model in self._models.items():
            model.first_token.add_to(first_token, [name])
            model.gaps.add_to(gaps, [name])
            model.queue_time.add_to(queue_time, [name])
            for route, duration in model.durations.items():
                duration.add_to(durations, [name, route])
        return first_token, gaps, queue_time, durations
