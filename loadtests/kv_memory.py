"""What nats-server holds when a bucket's key is written again and again.

JetStream keeps the block of a file that it writes to in memory, whatever of it has been
overwritten, and begins a new one after 8 MB. Written at a fleet's pace that takes hours to fill,
and looks like a leak meanwhile; here the same is written in a minute or two.
"""

import secrets
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
import uvloop
from cyclopts.validators import Number

from loadtests.figures import markdown
from loadtests.memory_growth import memory_of
from loadtests.overwriting import SIZE, overwrite
from shared.broker import Identity, NatsServer
from shared.bus import Bus
from shared.kv import WORKERS, Kv

__all__ = ("measure",)

WORKER = "worker-1"
KEPT = "worker-2"
"""Its key is written once: older than all others, it keeps the first block from being dropped."""
app = cyclopts.App(help=__doc__)


async def measure(writes: int, a_second: float, every: int) -> list[tuple[str, ...]]:
    """Write so often; returns rows of writes, MB written, resident and anonymous MB."""
    identities = [Identity(WORKER, "worker", secrets.token_hex(16))]
    identities += [Identity(KEPT, "worker", secrets.token_hex(16))]
    identities += [Identity("mesh-1", "mesh", secrets.token_hex(16))]
    rows = []
    async with AsyncExitStack() as exits:
        folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="mesh-load-"))
        server = NatsServer(identities=identities, data_dir=Path(folder) / "nats")
        nats = await exits.enter_async_context(server)

        async def bus(name: str, kind: Literal["worker", "mesh"]) -> Bus:
            return await exits.enter_async_context(
                Bus.connect(nats.url_for(name), identity=name, kind=kind)
            )

        await Kv(await bus("mesh-1", "mesh")).make(WORKERS)
        await Kv(await bus(KEPT, "worker")).tell(WORKERS, KEPT, secrets.token_bytes(SIZE))
        writer = await bus(WORKER, "worker")

        def look(number: int) -> None:
            held = memory_of(nats.pid)
            row = (number, number * SIZE / 1e6, held.rss / 1e6, held.anonymous / 1e6)
            rows.append(tuple(f"{value:,.0f}" for value in row))

        await overwrite(writer, WORKER, writes=writes, a_second=a_second, every=every, look=look)
    return rows


@app.default
def main(
    *,
    writes: Annotated[int, cyclopts.Parameter(validator=Number(gte=1))] = 60_000,
    a_second: Annotated[float, cyclopts.Parameter(validator=Number(gt=0))] = 1_000.0,
    every: Annotated[int, cyclopts.Parameter(validator=Number(gte=1))] = 5_000,
) -> None:
    """Print what the server holds.

    Args:
        writes: of one key, of 2,000 bytes each
        a_second: how fast
        every: writes between two rows
    """
    rows = uvloop.run(measure(writes, a_second, every))
    print(markdown(("writes", "MB written", "RSS, MB", "heap, MB"), rows))


if __name__ == "__main__":
    app()
