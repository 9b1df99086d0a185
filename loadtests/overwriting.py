"""A bucket's key written again and again, as a worker's beat is, only faster."""

import asyncio
import secrets
import time
from collections.abc import Callable

from shared.bus import Bus
from shared.kv import WORKERS, Kv

__all__ = ("SIZE", "overwrite")

SIZE = 2000
"""Bytes of a value, as many as a beat has."""
_AT_ONCE = 100


async def overwrite(
    writer: Bus,
    key: str,
    *,
    writes: int,
    a_second: float,
    every: int,
    look: Callable[[int], object],
) -> None:
    """Write a key of the workers' bucket so often, and so fast at most; `look` is called with the
    number of writes before the first and after each `every` of them.
    """
    began = time.monotonic()
    kv = Kv(writer)
    for number in range(writes + 1):
        if number % _AT_ONCE == 0:
            await writer.barrier()
            await asyncio.sleep(began + number / a_second - time.monotonic())
        if number % every == 0:
            look(number)
        if number < writes:
            await kv.tell(WORKERS, key, secrets.token_bytes(SIZE))
