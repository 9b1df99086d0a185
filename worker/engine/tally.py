"""What an engine has done since its start."""

import msgspec

from worker.engine.speculation.candidates import Counters
from worker.link import EngineStats

__all__ = ("Tally",)


class Tally(msgspec.Struct):
    """Counts of the loop, which only grow."""

    prompt_tokens: int = 0
    """Of all sequences that got a slot; what was replayed of their answers is not counted."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0

    def stats(
        self, *, running: int, waiting: int, kv_used: float, speculation: Counters | None
    ) -> EngineStats:
        """The same as the agent hears it, beside the load: `kv_used` is a share, 0 to 1."""
        return EngineStats(
            running=running,
            waiting=waiting,
            kv_used=round(kv_used, 4),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            drafted=sum(speculation.drafted) if speculation else 0,
            accepted=sum(speculation.accepted) if speculation else 0,
            steps=self.steps,
            drafted_at=speculation.trimmed(speculation.drafted) if speculation else (),
            accepted_at=speculation.trimmed(speculation.accepted) if speculation else (),
            gain=speculation.gain if speculation else 1.0,
        )
