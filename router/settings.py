"""Everything a router can be told."""

import msgspec

__all__ = ("Settings",)

MIB = 1024 * 1024


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One router process. Times are in seconds, sizes in bytes."""

    nats: str = "nats://127.0.0.1:4222"
    host: str = "127.0.0.1"
    port: int = 9337
    name: str = "router"
    max_body: int = 32 * MIB
    request_timeout: float = 600.0
    """How long a request may take in all, unless it says otherwise by `X-Request-Timeout`."""
    grace: float = 30.0
    """How long open answers may go on after SIGTERM."""
    ping_interval: float = 10.0
    """A stream that has nothing to say says so this often."""
    accept_timeout: float = 10.0
    """How long a worker may take to say that it has a request."""
    stall_timeout: float = 60.0
    """How long a worker may fall silent between two tokens."""
    reader_timeout: float = 60.0
    """How long a client may leave a full connection unread."""
    held_limit: int = MIB
    """Most that is kept for a client that reads slower than its answer is made."""
