"""A check: a name, what it looks for, and the function that looks."""

from collections.abc import Awaitable, Callable

import msgspec

from mesh.verify.endpoint import Endpoint
from mesh.verify.finding import Finding

__all__ = ("Check",)


class Check(msgspec.Struct, frozen=True):
    """One of the checks; `run` may raise `Fault`, with which the check fails."""

    name: str
    """`group.name`, as `--only` and `--skip` take it."""
    about: str
    """What is right, as the end of "checks that …"."""
    run: Callable[[Endpoint], Awaitable[Finding]]

    @property
    def group(self) -> str:
        """The part before the dot."""
        return self.name.partition(".")[0]
