"""nats-py 2.16's client with its faults fenced; `shared.bus` alone uses it.

What is changed, and why (each has a test in `tests/nats/test_fences.py`):

- Messages of our subscriptions go from the read loop straight to a synchronous callback. There is
  no queue that could overflow (nats-py drops the newest message then), no task and no header parse
  per message, and a PONG proves that all that came before it has been handled.
- A PING queues behind what was published before it. nats-py writes it past the pending commands,
  so that its `flush()` can return before they have left.
- A PONG whose waiter gave up is ignored. nats-py sets a result on the cancelled future; the error
  ends its read loop without a word, and the connection stays deaf.
- What was published but had not left when the connection broke is dropped. nats-py sends it after
  the reconnect, when nobody wants it any more.
- A read loop or a reconnect that fails in an unforeseen way reconnects or closes. In nats-py the
  connection would look alive for ever.
- Closing while a reconnect is being tried ends the tries. nats-py cancels them once, which can get
  lost, and they then go on for ever beside the closed client.

All of it leans on private names, which is why `pyproject.toml` pins the exact version.
"""

import asyncio
from collections.abc import Callable
from random import uniform
from typing import Any

import msgspec
import structlog
from nats import errors
from nats.aio.client import Client, Server

__all__ = ("BusMessage", "FencedClient", "choose_server")

_PING = b"PING\r\n"
_log = structlog.get_logger()


class BusMessage(msgspec.Struct, frozen=True, gc=False):
    """A message as the callback of a subscription gets it."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None = None
    status: str = ""
    """Set by the server only, e.g. "503" when nobody listens on the subject of a request."""


def choose_server(
    pool: list[Server], draw: Callable[[float, float], float]
) -> tuple[Server | None, float]:
    """Pick the server to reconnect to, and the seconds to wait before.

    The one that failed least often, after a random wait whose bound doubles with every failure up
    to 3 s: when a server restarts, its thousand clients must not return in the same instant.
    """
    if not pool:
        return None, draw(0.1, 3.0)
    server = min(pool, key=lambda candidate: candidate.reconnects)
    return server, draw(0.01, min(3.0, 0.1 * 2 ** min(server.reconnects, 5)))


class FencedClient(Client):
    """A nats-py client whose known faults are worked around; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.callbacks: dict[int, Callable[[BusMessage], None]] = {}
        self._ending = False

    async def join(self, subject: str, queue: str, callback: Callable[[BusMessage], None]) -> int:
        """Subscribe with a synchronous callback; returns the subscription's number."""
        number = self._sid + 1
        self.callbacks[number] = callback
        try:
            await self.subscribe(subject, queue)
        except BaseException:
            self.callbacks.pop(number, None)
            raise
        return number

    async def withdraw(self, number: int) -> None:
        """Tell the server to send no more; messages on their way still reach the callback.

        The subscription is forgotten first, so that a reconnect cannot bring it back.
        """
        self._remove_sub(number)
        if self.is_connected:
            await self._send_unsubscribe(number)

    async def ping(self) -> asyncio.Future[bool]:
        """Send a PING behind all that is pending.

        The future ends with the PONG, or is cancelled when the connection breaks. It must not be
        awaited by something that may cancel it.
        """
        pong: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._send_ping(pong)
        return pong

    def forget_pending(self) -> None:
        """Drop what has not left, and wake those who wait for a PONG of the lost connection."""
        self._pending.clear()
        self._pending_data_size = 0
        for pong in self._pongs:
            pong.cancel()
        self._pongs.clear()

    def abort(self) -> None:
        """Cut the connection without waiting for anything."""
        writer = getattr(self._transport, "_bare_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        callback = self.callbacks.get(sid)
        if callback is None:
            return
        parsed: dict[str, str] | None = None
        status = ""
        if headers:
            line, _, rest = headers.partition(b"\r\n")
            # "NATS/1.0 503": a status follows the version only if the server itself answers.
            status = line[9:12].decode("ascii", "replace")
            parsed = self._parse_header_lines(rest)
        try:
            callback(BusMessage(subject.decode(), reply.decode(), data, parsed, status))
        except Exception:
            _log.exception("bus.callback_failed", subject=subject.decode("utf-8", "replace"))

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(_PING)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    async def _read_loop(self) -> None:
        await super()._read_loop()
        task = asyncio.current_task()
        stopped = self.is_closed or self.is_reconnecting or (task is not None and task.cancelling())
        if not stopped:
            await self._process_op_err(errors.ProtocolError())

    async def _attempt_reconnect(self) -> None:
        try:
            await super()._attempt_reconnect()
        except Exception:
            _log.exception("bus.reconnect_failed")
            await self._close(Client.CLOSED)

    async def _process_op_err(self, e: Exception) -> None:
        if not self._ending:
            await super()._process_op_err(e)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if status == Client.CLOSED:
            self._ending = True
            await self._end_reconnect()
        await super()._close(status, do_cbs)

    async def _end_reconnect(self) -> None:
        task, self._reconnection_task = self._reconnection_task, None
        self._reconnection_task_future = None
        if task is None or task is asyncio.current_task():
            return
        # Once is not enough: Python 3.11's wait_for drops a cancellation that meets a result.
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.05)

    def next_server(self, pool: list[Server], info: dict[str, Any]) -> tuple[Server | None, float]:
        """nats-py's `reconnect_to_server_handler`."""
        return choose_server(pool, uniform)
