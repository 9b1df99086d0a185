"""Every subject and queue name. Nothing else may format one.

Layout (version `v1`; a worker, router or model is always exactly one token):

    mesh.v1.infer.<model>            queue group FREE: only workers with a free slot are subscribed
    mesh.v1.direct.<worker>.<model>  one worker's own door, for a request that may have to queue
    mesh.v1.body.<worker>            chunks of a body too large for one message
    mesh.v1.cancel.<worker>          attempts whose client has left
    mesh.v1.ping.<worker>            round-trip measurement (the worker echoes)
    mesh.v1.ring.<worker>.<group>    activations for one worker's stage of a split model
    mesh.v1.beat.<worker>            presence and load of a worker, twice a second
    mesh.v1.router.<router>          presence and load of a router
    mesh.v1.settings                 what the operator has set for all models, from routers
    mesh.v1.kv.<bucket>.<key>        what has just been written into a bucket, told by the server
    _INBOX_<identity>.>              the only inbox an identity may subscribe to

Buckets of JetStream's key-value store, and their keys:

    mesh-demand   <model>.<router>   what one router knows of the demand for a model
    mesh-roles    <model>.<number>   who holds replica `number` of a model
    mesh-workers  <worker>           a worker's beat, for other workers
    mesh-models   <model>            what the operator has set for a model

Nothing may lie below a subject that is granted with a final `*`: the server takes a subscription
to `mesh.v1.infer.>` for one that `mesh.v1.infer.*` allows. Hence a worker's door has its own root.
"""

import re

__all__ = (
    "BEATS",
    "BODIES",
    "CANCELS",
    "DEMAND",
    "DIRECT",
    "FREE",
    "INFER",
    "MODELS",
    "PINGS",
    "RINGS",
    "ROLES",
    "ROUTERS",
    "SETTINGS",
    "WORKERS",
    "beat",
    "body",
    "bucket_create",
    "bucket_entry",
    "bucket_read",
    "bucket_told",
    "cancel",
    "decode_token",
    "demand_key",
    "doors",
    "encode_token",
    "inbox",
    "infer",
    "infer_direct",
    "lease_key",
    "model_key",
    "ping",
    "read_demand_key",
    "read_lease_key",
    "read_model_key",
    "ring",
    "rings",
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
RINGS = f"{PREFIX}.ring.*.*"
SETTINGS = f"{PREFIX}.settings"
DEMAND = "mesh-demand"
ROLES = "mesh-roles"
WORKERS = "mesh-workers"
MODELS = "mesh-models"

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


def ring(worker: str, group: str) -> str:
    """Subject on which one worker's stage of a ring takes activations; `group` is a token."""
    return f"{PREFIX}.ring.{worker}.{group}"


def rings(worker: str) -> str:
    """All of one worker's stages."""
    return f"{PREFIX}.ring.{worker}.*"


def beat(worker: str) -> str:
    """Subject of one worker's beats."""
    return f"{PREFIX}.beat.{worker}"


def router(identity: str) -> str:
    """Subject of one router's beats."""
    return f"{PREFIX}.router.{identity}"


def inbox(identity: str) -> str:
    """Inbox prefix of one identity, without the trailing `.`."""
    return f"_INBOX_{valid_identity(identity)}"


def bucket_entry(bucket: str, key: str) -> str:
    """Subject to publish on in order to write a key."""
    return f"$KV.{bucket}.{key}"


def bucket_told(bucket: str, key: str = ">") -> str:
    """Subject on which the server tells what was written into a bucket."""
    return f"{PREFIX}.kv.{bucket}.{key}"


def bucket_create(bucket: str) -> str:
    """JetStream's subject for making a bucket."""
    return f"$JS.API.STREAM.CREATE.KV_{bucket}"


def bucket_read(bucket: str) -> str:
    """JetStream's subject for reading a bucket without a consumer."""
    return f"$JS.API.DIRECT.GET.KV_{bucket}"


def demand_key(model: str, router: str) -> str:
    """Key of one router's account of a model's demand; `*` for either stands for all."""
    return f"{model if model == '*' else encode_token(model)}.{router}"


def read_demand_key(key: str) -> tuple[str, str]:
    """Model and router of a demand key.

    Raises:
        ValueError: it is none.
    """
    token, _, identity = key.partition(".")
    return decode_token(token), valid_identity(identity)


def lease_key(model: str, number: int) -> str:
    """Key of the lease of a model's replica `number`, from 0."""
    return f"{encode_token(model)}.{number}"


def read_lease_key(key: str) -> tuple[str, int]:
    """Model and number of a lease's key.

    Raises:
        ValueError: it is none.
    """
    token, _, number = key.partition(".")
    if not number.isascii() or not number.isdigit() or lease_key("m", int(number)) != f"m.{number}":
        raise ValueError(f"{key!r} is not the key of a lease")
    return decode_token(token), int(number)


def model_key(model: str) -> str:
    """Key of a model's settings."""
    return encode_token(model)


def read_model_key(key: str) -> str:
    """Model of a settings key.

    Raises:
        ValueError: it is none.
    """
    return decode_token(key)
