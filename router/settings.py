"""Everything a router can be told."""

import msgspec

from shared.distance import CAP

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
    stall_timeout: float = 10.0
    """How long a worker may fall silent between two tokens while another could go on."""
    nats_patience: float = 15.0
    """How long answers that have been begun wait for NATS to come back."""
    resumes: int = 3
    """How often an answer whose attempt is lost may go on on another one; 0: never."""
    retry_share: float = 0.2
    """Of the requests, how many may be tried anew before their first token, beside a few a second
    that always may (`router.retrying`)."""
    idempotency_seconds: float = 600.0
    """How long a finished answer is kept for those who send its `Idempotency-Key` again."""
    idempotency_memory: int = 64 * MIB
    """Bytes for such answers; 0: the header is ignored."""
    reader_timeout: float = 60.0
    """How long a client may leave a full connection unread."""
    max_rtt: float = CAP
    """Round trip beyond which a worker gets nothing while a nearer one serves the model."""
    far: bool = False
    """Whether workers beyond it are used where no nearer one serves the model."""
    load_bound: float = 1.75
    """How far above the mean load a worker may be and still get its own conversations."""
    held_per_model: int = 256
    """Requests that may wait for one model to be brought up."""
    held_in_all: int = 1024
    wait_for_workers: float = 0.0
    """How long a request for a known model waits although no worker is left that could load it;
    for where workers are started on demand."""
    held_limit: int = MIB
    """Most that is kept for a client that reads slower than its answer is made."""
