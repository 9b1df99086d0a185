"""The connection to NATS: the only way anything is published, subscribed or asked.

Delivery is at most once. What is published while the connection is down fails at once and is never
kept for later; subscriptions survive a reconnect by themselves.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

import structlog
from nats import errors

from shared import subjects
from shared._nats_client import BusMessage, FencedClient
from shared.errors import PayloadTooLarge

__all__ = ("Bus", "BusMessage", "BusUnavailable", "Subscription")

_CLOSE_TIMEOUT = 3.0
_LEAVE_TIMEOUT = 2.0
_PENDING_LIMIT = 4 * 1024 * 1024
"""Bytes waiting for the socket beyond which a publisher has to wait."""
_PENDING_TIMEOUT = 10.0
_CONTROL_LINE = 4000
"""Bytes of subject and reply together. The server cuts a client, for good, at 4096 in a line."""

_log = structlog.get_logger()


class BusUnavailable(Exception):
    """NATS is away, refuses us, or nobody answers; the message is one line fit for a person."""


class Subscription:
    """Interest in a subject; ends with `leave` or with the bus."""

    def __init__(self, bus: "Bus", client: FencedClient, number: int, subject: str) -> None:
        self.subject = subject
        self._bus = bus
        self._client = client
        self._number = number
        self._left = False

    async def leave(self) -> None:
        """Take no more; what the server has sent already is still handed to the callback."""
        if self._left:
            return
        self._left = True
        try:
            await self._client.withdraw(self._number)
            if self._client.is_connected:
                await self._bus.barrier(_LEAVE_TIMEOUT)
        except BusUnavailable as error:
            # The connection broke on the way: then nothing more can come.
            _log.warning("bus.leave_unconfirmed", subject=self.subject, reason=str(error))
        finally:
            self._client.callbacks.pop(self._number, None)


class Bus:
    """A connection of one identity. Made by `Bus.connect`, closed with its context."""

    def __init__(
        self,
        identity: str,
        kind: str,
        client: FencedClient,
        on_state: Callable[[bool], None] | None,
    ) -> None:
        self.identity = identity
        self.kind = kind
        self.inbox = subjects.inbox(identity)
        self.closed = asyncio.Event()
        """Set when the connection is gone for good; the process should end or rebuild the bus."""
        self._client = client
        self._on_state = on_state
        self._closing = False
        self._last_number = 0
        self._asked: dict[str, asyncio.Future[BusMessage]] = {}
        self._log = _log.bind(identity=identity, kind=kind)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        *,
        identity: str,
        kind: Literal["router", "worker", "mesh"],
        timeout: float = 5.0,
        on_state: Callable[[bool], None] | None = None,
    ) -> AsyncIterator["Bus"]:
        """Connect, and close at the end of the context.

        Args:
            url: one or several, comma separated, `nats://user:password@host:port`; user and
                password are percent-encoded, and those of one URL count for all.
            identity: who we are; also the name of the NATS user and of the inbox.
            kind: shown in logs and in NATS's monitoring.
            timeout: seconds for the first connection. Later ones are tried for ever.
            on_state: told True after each connection, the first included, and False after a loss.

        Raises:
            BusUnavailable: no server could be reached, or it refused us.
            ValueError: the identity is not one.
        """
        bus = cls(subjects.valid_identity(identity), kind, FencedClient(), on_state)
        await bus._open(url, timeout)
        try:
            yield bus
        finally:
            await bus._close()

    @property
    def connected(self) -> bool:
        """Whether a publish would be accepted now."""
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        """Bytes a message may have, headers included, as the server told."""
        return self._client.max_payload

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send a message; returns before it has left (see `barrier`).

        Raises:
            BusUnavailable: not connected; nothing is kept for later.
            PayloadTooLarge: data and headers exceed `max_payload`, or the names a subject may have.
        """
        client = self._client
        if not client.is_connected:
            raise BusUnavailable("NATS is away")
        size = len(data) if headers is None else len(data) + _header_size(headers)
        if size > client.max_payload:
            raise PayloadTooLarge(
                f"a message of {size} bytes exceeds NATS's limit of {client.max_payload} bytes"
            )
        if len(subject) + len(reply) > _CONTROL_LINE // 4:
            _check_names(subject, reply)
        try:
            await client.publish(subject, data, reply, headers)
        except (errors.BadSubjectError, errors.BadHeaderError) as error:
            raise ValueError(f"cannot publish on {subject!r}: {error}") from None
        except errors.Error as error:
            raise BusUnavailable(f"NATS is away: {error}") from None
        if client.pending_data_size > _PENDING_LIMIT:
            await self.barrier(_PENDING_TIMEOUT)

    async def subscribe(
        self, subject: str, callback: Callable[[BusMessage], None], *, queue: str = ""
    ) -> Subscription:
        """Have `callback` called for each message, in order, from the connection's own reader.

        The callback must not block. What it raises is logged and ends nothing. The server knows of
        the subscription for sure only after a `barrier`; it is renewed by itself on a reconnect.

        Raises:
            BusUnavailable: the connection is closed for good.
            ValueError: not a subject or queue name.
        """
        _check_names(subject, queue)
        try:
            number = await self._client.join(subject, queue, callback)
        except errors.BadSubjectError:
            raise ValueError(f"cannot subscribe to {subject!r} {queue!r}") from None
        except errors.Error as error:
            raise BusUnavailable(f"NATS connection is closed: {error}") from None
        return Subscription(self, self._client, number, subject)

    async def barrier(self, timeout: float = 2.0) -> None:
        """Return once all that was published or subscribed before has reached the server.

        Raises:
            BusUnavailable: not connected, the connection broke meanwhile, or no answer in time.
        """
        if not self._client.is_connected:
            raise BusUnavailable("NATS is away")
        pong = await self._client.ping()
        done, _ = await asyncio.wait({pong}, timeout=timeout)
        if not done:
            raise BusUnavailable(f"NATS did not answer within {timeout:g} s")
        if pong.cancelled():
            raise BusUnavailable("the connection to NATS broke")

    async def request(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float,
        headers: dict[str, str] | None = None,
    ) -> BusMessage:
        """Publish and wait for one answer; for pings and buckets, not for generation.

        Raises:
            BusUnavailable: not connected, nobody listens there, or no answer in time.
            PayloadTooLarge: as `publish`.
        """
        self._last_number += 1
        number = str(self._last_number)
        answer: asyncio.Future[BusMessage] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            await self.publish(subject, data, reply=f"{self.inbox}.q.{number}", headers=headers)
            async with asyncio.timeout(timeout):
                message = await answer
        except TimeoutError:
            raise BusUnavailable(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            del self._asked[number]
        if message.status == "503":
            raise BusUnavailable(f"nobody listens on {subject}")
        return message

    def _answered(self, message: BusMessage) -> None:
        answer = self._asked.get(message.subject.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def _open(self, url: str, timeout: float) -> None:
        servers, user, password = _parse(url)
        shown = ", ".join(servers)
        failures: list[Exception] = []
        connecting = True

        async def error_cb(error: Exception) -> None:
            # nats-py would try the first connection for ever; an exception from here ends it.
            if connecting:
                failures.append(error)
                if len(failures) >= len(servers) or _refused(error):
                    raise BusUnavailable(f"NATS at {shown}: {_reason(error)}")
                return
            self._failed(error)

        try:
            async with asyncio.timeout(timeout):
                await self._client.connect(
                    servers=servers,
                    user=user if password is not None else None,
                    password=password,
                    token=user if password is None else None,
                    name=self.identity,
                    inbox_prefix=self.inbox,
                    error_cb=error_cb,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                    closed_cb=self._gone,
                    discovered_server_cb=self._discovered,
                    lame_duck_mode_cb=self._lame_duck,
                    reconnect_to_server_handler=self._client.next_server,
                    max_reconnect_attempts=-1,
                    connect_timeout=2,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=-1,
                )
                connecting = False
                await self.subscribe(f"{self.inbox}.q.*", self._answered)
                await self.barrier(timeout)
        except BaseException as error:
            connecting = False
            await self._close()
            if isinstance(error, BusUnavailable) or not isinstance(error, Exception):
                raise
            last = failures[-1] if failures and isinstance(error, TimeoutError) else error
            raise BusUnavailable(f"NATS at {shown}: {_reason(last)}") from None
        self._log.info("bus.connected", servers=shown)
        self._tell(True)

    async def _close(self) -> None:
        self._closing = True
        client = self._client
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                if client.is_connected:
                    await self.barrier(_CLOSE_TIMEOUT / 2)
                await client.close()
        except (BusUnavailable, TimeoutError) as error:
            self._log.warning("bus.close_unclean", reason=str(error) or "timeout")
            client.abort()
            client.forget_pending()
            await client.close()

    def _failed(self, error: Exception) -> None:
        # A connection that is down is told once, as `bus.disconnected`; each try is no news,
        # unless we are refused, which trying does not mend.
        lost = isinstance(error, OSError | errors.UnexpectedEOF | errors.StaleConnectionError)
        away = (lost or not self._client.is_connected) and not _refused(error)
        tell = self._log.debug if self._closing or away else self._log.error
        tell("bus.error", error=f"{type(error).__name__}: {error}")

    async def _disconnected(self) -> None:
        self._client.forget_pending()
        if not self._closing:
            self._log.warning("bus.disconnected")
        self._tell(False)

    async def _reconnected(self) -> None:
        self._log.info("bus.reconnected")
        self._tell(True)

    async def _discovered(self) -> None:
        self._log.info("bus.server_discovered", servers=len(self._client.servers))

    async def _lame_duck(self) -> None:
        self._log.warning("bus.server_leaving")

    async def _gone(self) -> None:
        if not self._closing:
            self._log.error("bus.closed", error=str(self._client.last_error or ""))
        self.closed.set()

    def _tell(self, connected: bool) -> None:
        if self._on_state is None:
            return
        try:
            self._on_state(connected)
        except Exception:
            self._log.exception("bus.on_state_failed")


def _header_size(headers: dict[str, str]) -> int:
    """Bytes of the header block, which the server counts as payload."""
    frame = len("NATS/1.0\r\n") + len("\r\n")
    return frame + sum(
        len(key.encode()) + len(value.encode()) + 4 for key, value in headers.items()
    )


def _check_names(subject: str, other: str) -> None:
    size = len(subject.encode()) + len(other.encode())
    if size > _CONTROL_LINE:
        raise PayloadTooLarge(
            f"a subject of {size} bytes exceeds NATS's limit of {_CONTROL_LINE} bytes"
        )


def _parse(url: str) -> tuple[list[str], str | None, str | None]:
    """Split off user and password.

    They must not stay in the URLs: errors and logs would show them, and a server that the cluster
    told of comes without them, so that a reconnect to it would be refused.
    """
    servers: list[str] = []
    logins: set[tuple[str, str | None]] = set()
    for number, part in enumerate(filter(None, (part.strip() for part in url.split(","))), 1):
        split, port = _split(part, number)
        if split.username:
            password = None if split.password is None else unquote(split.password)
            logins.add((unquote(split.username), password))
        host = f"[{split.hostname}]" if ":" in (split.hostname or "") else split.hostname
        servers.append(f"{split.scheme}://{host}:{port}")
    if not servers:
        raise BusUnavailable("NATS URL is empty; wanted nats://HOST:PORT")
    if len(logins) > 1:
        raise BusUnavailable(f"NATS at {', '.join(servers)}: the URLs name different users")
    user, secret = logins.pop() if logins else (None, None)
    return servers, user, secret


def _split(part: str, number: int) -> tuple[SplitResult, int]:
    # The text itself is not shown: it may hold a password.
    wrong = BusUnavailable(f"NATS URL number {number} is wrong; wanted nats://HOST:PORT")
    try:
        split = urlsplit(part if "://" in part else f"nats://{part}")
        port = split.port or 4222
    except ValueError:
        raise wrong from None
    if split.scheme not in ("nats", "tls") or not split.hostname:
        raise wrong
    return split, port


def _refused(error: Exception) -> bool:
    return "authorization violation" in str(error).lower()


def _reason(error: BaseException) -> str:
    if _refused(error) if isinstance(error, Exception) else False:
        return "user or password refused"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError | errors.TimeoutError):
        return "no answer in time"
    if isinstance(error, UnicodeDecodeError | ValueError):
        return "what answers there is not a NATS server"
    return str(error).removeprefix("nats: ") or type(error).__name__
