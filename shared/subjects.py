"""Every subject and queue name. Nothing else may format one.

Layout (version `v1`; a worker, router or model is always exactly one token):

    mesh.v1.infer.<model>            queue group FREE: only workers with a free slot are subscribed
    mesh.v1.direct.<worker>.<model>  one worker's own door, for a request that may have to queue
    mesh.v1.body.<worker>            chunks of a body too large for one message
    mesh.v1.cancel.<worker>          attempts whose client has left
    mesh.v1.ping.<worker>            round-trip measurement (the worker echoes)
    mesh.v1.beat.<worker>            presence and load of a worker, twice a second
    mesh.v1.router.<router>          presence and load of a router
    _INBOX_<identity>.>              the only inbox an identity may subscribe to

Nothing may lie below a subject that is granted with a final `*`: the server takes a subscription
to `mesh.v1.infer.>` for one that `mesh.v1.infer.*` allows. Hence a worker's door has its own root.
"""

import re

__all__ = (
    "BEATS",
    "BODIES",
    "CANCELS",
    "DIRECT",
    "FREE",
    "INFER",
    "PINGS",
    "ROUTERS",
    "beat",
    "body",
    "cancel",
    "decode_token",
    "doors",
    "encode_token",
    "inbox",
    "infer",
    "infer_direct",
    "ping",
    "router",
    "valid_identity",
)

PREFIX = "mesh.v1"
FREE = "free"
BEATS = f"{PREFIX}.beat.*"
ROUTERS = f"{PREFIX}.router.*"
INFER = f"{PREFIX}.infer.*"
DIRECT = f"{PREFIX}.direct.*.*"
BODIES = f"{PREFIX}.body.*"
CANCELS = f"{PREFIX}.cancel.*"
PINGS = f"{PREFIX}.ping.*"

_IDENTITY = re.compile(r"[A-Za-z0-9-]{1,64}")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def encode_token(name: str) -> str:
    """Encode any non-empty name into one token of `[A-Za-z0-9_=-]`, legal in subjects and KV keys.

    Bytes of the UTF-8 form outside `[A-Za-z0-9_-]` become `=XX` (hex, upper case).

    Raises:
        ValueError: the name is empty or holds a lone surrogate.
    """
    if not name:
        raise ValueError("a name must not be empty")
    return "".join(chr(b) if b in _PLAIN else f"={b:02X}" for b in name.encode())


def decode_token(token: str) -> str:
    """Undo `encode_token`.

    Raises:
        ValueError: the token was not made by `encode_token`.
    """
    head, *rest = token.split("=")
    out = bytearray(head.encode("ascii"))
    for part in rest:
        if len(part) < 2:
            raise ValueError(f"{token!r} is not an encoded name")
        out.append(int(part[:2], 16))
        out += part[2:].encode("ascii")
    name = out.decode()
    if encode_token(name) != token:
        raise ValueError(f"{token!r} is not an encoded name")
    return name


def valid_identity(identity: str) -> str:
    """Return the identity if it is 1 to 64 of `[A-Za-z0-9-]`.

    Raises:
        ValueError: it is not, and would not be one subject token.
    """
    if not _IDENTITY.fullmatch(identity):
        raise ValueError(f"identity {identity!r}: wanted 1 to 64 letters, digits or '-'")
    return identity


def infer(model: str) -> str:
    """Subject of a model's queue group; `model` is the plain name."""
    return f"{PREFIX}.infer.{encode_token(model)}"


def infer_direct(model: str, worker: str) -> str:
    """Subject of one worker's own door for a model."""
    return f"{PREFIX}.direct.{worker}.{encode_token(model)}"


def doors(worker: str) -> str:
    """One worker's own doors for all its models."""
    return f"{PREFIX}.direct.{worker}.*"


def body(worker: str) -> str:
    """Subject on which one worker takes chunks of large bodies."""
    return f"{PREFIX}.body.{worker}"


def cancel(worker: str) -> str:
    """Subject on which one worker takes cancellations."""
    return f"{PREFIX}.cancel.{worker}"


def ping(worker: str) -> str:
    """Subject a worker echoes, for round-trip measurement."""
    return f"{PREFIX}.ping.{worker}"


def beat(worker: str) -> str:
    """Subject of one worker's beats."""
    return f"{PREFIX}.beat.{worker}"


def router(identity: str) -> str:
    """Subject of one router's beats."""
    return f"{PREFIX}.router.{identity}"


def inbox(identity: str) -> str:
    """Inbox prefix of one identity, without the trailing `.`."""
    return f"_INBOX_{valid_identity(identity)}"
