"""What is done to the caches of all stages alike."""

from collections.abc import Iterable

from shared.pipeline import Copy, Forget, Operation
from worker.engine.llama import Context

__all__ = ("CacheRefused", "apply")


class CacheRefused(RuntimeError):
    """llama.cpp could not do it, and the caches of the stages differ from now on."""


def apply(operations: Iterable[Operation], context: Context) -> None:
    """Do these in their order.

    Raises:
        CacheRefused: one could not be done.
    """
    for operation in operations:
        if isinstance(operation, Forget):
            done = context.forget(operation.slot, operation.start)
        elif isinstance(operation, Copy):
            done = context.copy(operation.source, operation.target)
        else:
            done = context.swap(operation.left, operation.right)
        if not done:
            raise CacheRefused(f"llama.cpp refused {operation}")
