"""Made-up workers: they load models, hold slots, and take as long as an engine would.

An answer's speed is fixed when it begins, from how many run on the host then: real engines slow
down and speed up meanwhile, which averages out. The prompt's part that a conversation brought
before is cached as long as the replica lives and has not had too many others since.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from loadtests.simulation.clock import Clock
from loadtests.simulation.traffic import Conversation
from shared.snapshot import Holding, WorkerView

__all__ = ("Host", "HostSpeed", "Loaded", "Request")

CACHED = 64
"""Conversations whose prompt a replica keeps."""
QUEUE = 64
"""Requests that wait at one replica."""


class HostSpeed(msgspec.Struct, frozen=True):
    """What hosts take, in seconds; as one GPU of the middle class with models of 1 to 8 GiB."""

    token: float = 0.020
    """Of an answer, alone on the host."""
    prompt_token: float = 0.0004
    crowding: float = 0.05
    """What each neighbour adds to both, as a share."""
    load_per_gib: float = 4.0
    load_spread: float = 0.3
    """Standard deviation of the logarithm of a load's time."""
    slow_share: float = 0.05
    """Of loads, those that take `slow_factor` times as long."""
    slow_factor: float = 6.0
    most_drain: float = 30.0
    """Seconds after which a replica hands back what still runs on it."""


class Request:
    """One turn on its way."""

    __slots__ = (
        "answer", "attempt", "conversation", "given_up", "held", "model", "prompt", "refused",
        "router", "since", "told", "turn", "worker",
    )  # fmt: skip

    def __init__(self, conversation: Conversation, turn: int, prompt: int, now: float) -> None:
        self.conversation = conversation
        self.model = conversation.model
        self.turn = turn
        self.prompt = prompt
        """Tokens of all turns so far."""
        self.answer = conversation.turns[turn].answer
        """Tokens that are still to be generated."""
        self.since = now
        self.told = False
        """Whether its first token has come."""
        self.held = False
        self.given_up = False
        self.attempt = 0
        self.refused: list[str] = []
        self.worker: Host | None = None
        self.router: Any = None


class Loaded:
    """A replica."""

    __slots__ = ("cache", "memory", "queue", "running", "since", "state")

    def __init__(self, memory: int, now: float) -> None:
        self.memory = memory
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.since = now
        self.running: dict[Request, tuple[float, float]] = {}
        """By request the moments of its first token and of its last."""
        self.queue: deque[Request] = deque()
        self.cache: OrderedDict[int, int] = OrderedDict()

    @property
    def busy(self) -> int:
        return len(self.running) + len(self.queue)


class Host:
    """A worker with what it holds."""

    def __init__(
        self,
        name: str,
        memory: int,
        able: Mapping[str, int],
        *,
        clock: Clock,
        speed: HostSpeed,
        slots: int,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.memory = memory
        self.able = able
        self.models: dict[str, Loaded] = {}
        self.open = True
        self.reachable = True
        self.changed: Callable[[Host, str], None] = lambda host, model: None
        """Hears that a model of this host has become ready, drains, or is gone."""
        self.first_token: Callable[[Request], None] = lambda request: None
        self.ended: Callable[[Request], None] = lambda request: None
        self.handed_back: Callable[[Request], None] = lambda request: None
        self._clock = clock
        self._speed = speed
        self._slots = slots
        self._rng = rng
        self._running = 0

    def view(self) -> WorkerView:
        """As others see it."""
        holds = tuple(
            Holding(model, loaded.state, loaded.since, loaded.busy, loaded.memory)
            for model, loaded in self.models.items()
        )
        return WorkerView(self.name, self.memory, self.able, holds, open=self.open)

    def used(self) -> int:
        """Bytes that its models take."""
        return sum(loaded.memory for loaded in self.models.values())

    def load(self, model: str) -> None:
        """Begin to load a model.

        Raises:
            AssertionError: it does not fit, or is there.
        """
        memory = self.able[model]
        assert model not in self.models, f"{self.name} holds {model}"
        assert self.used() + memory <= self.memory, f"{self.name} has no room for {model}"
        loaded = self.models[model] = Loaded(memory, self._clock.now)
        speed = self._speed
        seconds = speed.load_per_gib * memory / 2**30
        seconds *= self._rng.lognormvariate(0.0, speed.load_spread)
        if self._rng.random() < speed.slow_share:
            seconds *= speed.slow_factor
        self._clock.after(seconds, self._loaded, model, loaded)

    def drain(self, model: str) -> None:
        """Take nothing more for a model, and forget it when what runs has ended."""
        loaded = self.models[model]
        loaded.state, loaded.since = "draining", self._clock.now
        waiting = list(loaded.queue)
        loaded.queue.clear()
        self.changed(self, model)
        for request in waiting:
            self.handed_back(request)
        if loaded.running:
            self._clock.after(self._speed.most_drain, self._interrupt, model, loaded)
        else:
            self._gone(model, loaded)

    def die(self) -> list[Request]:
        """Be gone at once; what it had to do is returned, to be resumed elsewhere."""
        self.open = self.reachable = False
        lost = self.cut_off()
        self.models.clear()
        return lost

    def cut_off(self) -> list[Request]:
        """Lose all that runs and waits, and keep what is loaded."""
        lost: list[Request] = []
        for loaded in self.models.values():
            lost += [*self._cut(loaded), *loaded.queue]
            loaded.queue.clear()
        return lost

    def take(self, request: Request) -> bool:
        """Run a request or have it wait; False: it is refused."""
        loaded = self.models.get(request.model)
        if loaded is None or loaded.state != "ready" or not self.reachable:
            return False
        if len(loaded.queue) >= QUEUE:
            return False
        request.worker = self
        if len(loaded.running) < self._slots:
            self._start(request, loaded)
        else:
            loaded.queue.append(request)
        return True

    def prefill(self, request: Request) -> float:
        """Seconds that its prompt would take if it began now."""
        loaded = self.models[request.model]
        cached = loaded.cache.get(request.conversation.number, 0)
        return max(1, request.prompt - cached) * self._speed.prompt_token * self._crowd()

    def slots_free(self, model: str) -> int:
        """Slots of a model that nothing runs in; below 0 if requests wait."""
        return self._slots - self.models[model].busy

    def _crowd(self) -> float:
        return 1 + self._speed.crowding * self._running

    def _start(self, request: Request, loaded: Loaded) -> None:
        prefill = self.prefill(request)
        decode = request.answer * self._speed.token * self._crowd()
        self._running += 1
        now = self._clock.now
        loaded.running[request] = now + prefill, now + prefill + decode
        cache = loaded.cache
        cache[request.conversation.number] = request.prompt + request.answer
        cache.move_to_end(request.conversation.number)
        if len(cache) > CACHED:
            cache.popitem(last=False)
        request.attempt += 1
        if not request.told:
            self._clock.after(prefill, self._first, request, request.attempt)
        self._clock.after(prefill + decode, self._end, request, request.attempt, loaded)

    def _first(self, request: Request, attempt: int) -> None:
        if request.attempt == attempt and not request.told:
            request.told = True
            self.first_token(request)

    def _end(self, request: Request, attempt: int, loaded: Loaded) -> None:
        if request.attempt != attempt or request not in loaded.running:
            return
        del loaded.running[request]
        self._running -= 1
        self.ended(request)
        if loaded.queue and len(loaded.running) < self._slots:
            self._start(loaded.queue.popleft(), loaded)
        if loaded.state == "draining" and not loaded.running:
            self._gone(request.model, loaded)

    def _loaded(self, model: str, loaded: Loaded) -> None:
        if self.models.get(model) is loaded and loaded.state == "loading":
            loaded.state, loaded.since = "ready", self._clock.now
            self.changed(self, model)

    def _interrupt(self, model: str, loaded: Loaded) -> None:
        if self.models.get(model) is not loaded:
            return
        left = self._cut(loaded)
        self._gone(model, loaded)
        for request in left:
            self.handed_back(request)

    def _cut(self, loaded: Loaded) -> list[Request]:
        """What runs stops, and goes on elsewhere from the token that it has come to."""
        now = self._clock.now
        for request, (first, last) in loaded.running.items():
            done = int(request.answer * max(0.0, (now - first) / (last - first)))
            request.answer -= min(done, request.answer - 1)
            request.prompt += done
            request.attempt += 1
        left = list(loaded.running)
        loaded.running.clear()
        self._running -= len(left)
        return left

    def _gone(self, model: str, loaded: Loaded) -> None:
        if self.models.get(model) is loaded:
            del self.models[model]
            self.changed(self, model)
