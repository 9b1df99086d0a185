"""While a model is let go, routers are told that they may take their attempts elsewhere.

Only an offer, made again and again: where nobody else serves the model, or has a slot free, they
stay here.
"""

import asyncio
from collections.abc import Callable, Iterable

from shared.protocol import Handback
from worker.admission import Ticket
from worker.replies import Replies

__all__ = ("HANDBACK_SECONDS", "hand_back")

HANDBACK_SECONDS = 1.0
"""Between two offers to take an attempt elsewhere: a worker that could may come at any time."""


async def hand_back(
    draining: asyncio.Event, tickets: Callable[[], Iterable[Ticket]], replies: Replies
) -> None:
    """Make the offers from when `draining` is set until cancelled."""
    await draining.wait()
    while True:
        for ticket in tickets():
            replies.say(ticket.reply, Handback(ticket.attempt))
        await asyncio.sleep(HANDBACK_SECONDS)
