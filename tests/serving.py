"""A nats-server for fixtures that are not asynchronous: started, and stopped whatever happens."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from shared.broker import NatsServer

__all__ = ("serving",)


@contextmanager
def serving(server: NatsServer) -> Iterator[NatsServer]:
    """Run the server within the block."""
    with asyncio.Runner() as runner:
        runner.run(server.__aenter__())
        try:
            yield server
        finally:
            runner.run(server.__aexit__(None, None, None))
