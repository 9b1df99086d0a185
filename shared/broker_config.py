"""What a nats-server is told: its settings, its users, and what each of them may do.

Pure text in, text out. Every identity is a NATS user of its own with an inbox of its own, so that
nobody can read another's prompts or answers, or speak in another's name.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from shared import subjects

__all__ = (
    "MAX_PAYLOAD",
    "Identity",
    "Permissions",
    "permissions",
    "render",
    "render_users",
    "ring_url",
    "ring_user",
)

MAX_PAYLOAD = 8 * 1024 * 1024
"""Bytes in one message; beyond 8 MiB the server itself warns."""

_BUCKETS = (subjects.DEMAND, subjects.ROLES, subjects.WORKERS, subjects.MODELS)
_RING = "-ring"
_ENVIRONMENT = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")


class Identity(msgspec.Struct, frozen=True):
    """One process that may connect.

    Of kind `ring` is what `render_users` adds for a worker's stages of split models.

    `password` is plain text or, as written by `nats server passwd`, a bcrypt hash; `$NAME` takes it
    from the server's environment, and the server does not start without it.
    """

    name: str
    kind: Literal["router", "worker", "mesh", "ring"]
    password: str

    def __repr__(self) -> str:
        return f"Identity(name={self.name!r}, kind={self.kind!r})"


class Permissions(msgspec.Struct, frozen=True):
    """Subjects a user may subscribe to and publish on; `S Q` is subject S in queue group Q only."""

    subscribe: tuple[str, ...]
    publish: tuple[str, ...]
    responses: bool = False
    """Whether it may answer on the reply subject of a message it received."""


def permissions(identity: Identity) -> Permissions:
    """Say what an identity may do; whatever is not listed is refused.

    A final `*` lets the server accept `>` in its place (tried with 2.15), so that it is granted
    only where nothing but what it names lies below.

    JetStream answers on whatever reply subject it is given, in the server's name: an answer sent to
    its own commands deletes a bucket (tried), elsewhere it overwrites a key. So workers may read no
    bucket, and those that they write do not answer. For a like reason workers hear each other
    through a bucket and never directly: what the server tells of a bucket has no reply subject
    that `allow_responses` would open.
    """
    name = identity.name
    inbox = f"{subjects.inbox(name)}.>"
    told = tuple(map(subjects.bucket_told, _BUCKETS))
    match identity.kind:
        case "worker":
            return Permissions(
                subscribe=(
                    f"{subjects.INFER} {subjects.FREE}",
                    subjects.doors(name),
                    subjects.body(name),
                    subjects.cancel(name),
                    subjects.ping(name),
                    subjects.SETTINGS,
                    *told,
                    inbox,
                ),
                publish=(
                    subjects.beat(name),
                    subjects.bucket_entry(subjects.WORKERS, name),
                    subjects.bucket_entry(subjects.ROLES, "*.*"),
                ),
                responses=True,
            )
        case "router":
            return Permissions(
                subscribe=(subjects.BEATS, subjects.ROUTERS, subjects.SETTINGS, *told, inbox),
                publish=(
                    subjects.INFER,
                    subjects.DIRECT,
                    subjects.BODIES,
                    subjects.CANCELS,
                    subjects.PINGS,
                    subjects.router(name),
                    subjects.SETTINGS,
                    subjects.bucket_entry(subjects.DEMAND, subjects.demand_key("*", name)),
                    *map(subjects.bucket_read, _BUCKETS),
                    *map(subjects.bucket_create, _BUCKETS),
                ),
            )
        case "ring":
            # No responses: a worker could open any subject to itself by a message of its own that
            # names it as reply subject.
            worker = name.removesuffix(_RING)
            return Permissions(subscribe=(subjects.rings(worker), inbox), publish=(subjects.RINGS,))
        case "mesh":
            return Permissions(
                subscribe=(subjects.BEATS, subjects.ROUTERS, *told, inbox),
                publish=(
                    subjects.PINGS,
                    subjects.bucket_entry(subjects.MODELS, "*"),
                    *map(subjects.bucket_read, _BUCKETS),
                    *map(subjects.bucket_create, _BUCKETS),
                ),
            )


def ring_user(worker: str) -> str:
    """The user beside a worker's own with which its stages of split models log in."""
    return f"{worker}{_RING}"


def ring_url(url: str) -> str:
    """A worker's URL of the server, or of several, with the name of its ring user instead."""
    return re.sub(r"(?<=//)([^/:@,]+)(?=:[^@,]*@)", rf"\1{_RING}", url)


def render_users(identities: Sequence[Identity]) -> str:
    """Write the `authorization` block; whoever is not in it cannot connect.

    Each worker gets a second user, for its stages of split models, with the same password.

    Raises:
        ValueError: two identities of one name, or a password that is empty or not printable.
    """
    identities = [user for identity in identities for user in (identity, *_beside(identity))]
    names = [identity.name for identity in identities]
    if len(set(names)) != len(names):
        raise ValueError(f"identities must have different names: {', '.join(sorted(names))}")
    lines = ["authorization {", "  users: ["]
    for identity in identities:
        lines += _user(identity)
    lines += ["  ]", "}", ""]
    return "\n".join(lines)


def _beside(identity: Identity) -> tuple[Identity, ...]:
    if identity.kind != "worker":
        return ()
    return (Identity(ring_user(identity.name), "ring", identity.password),)


def render(
    identities: Sequence[Identity],
    *,
    port: int,
    store_dir: Path | str,
    host: str = "127.0.0.1",
    http_port: int | None = None,
    server_name: str = "mesh",
    max_payload: int = MAX_PAYLOAD,
    ports_dir: Path | str | None = None,
) -> str:
    """Write a whole configuration.

    Args:
        identities: everybody who may connect.
        port: 0 lets the server choose one, which it tells in a file in `ports_dir`.
        store_dir: where JetStream keeps its data.
        host: address to listen on.
        http_port: where to serve monitoring, without a password; None for nowhere.
        server_name: shown in logs and monitoring, unique in a cluster.
        max_payload: bytes in one message, its headers included.
        ports_dir: folder for the file that tells the real ports.
    """
    lines = [
        f"server_name: {quote(server_name)}",
        f"host: {quote(host)}",
        f"port: {port or -1}",
        "",
        "# A prompt travels whole up to this size; the router answers 413 beyond.",
        f"max_payload: {max_payload}",
        "# A client that takes nothing for so long is cut, and reconnects by itself.",
        'write_deadline: "10s"',
        "# Else one slow router would slow the workers that answer it, and so everybody's streams.",
        "no_fast_producer_stall: true",
        "# A host that lost power stays in its queue groups until its pings are missed.",
        'ping_interval: "5s"',
        "ping_max: 2",
        "",
        "# Holds fleet state only, never requests; without bounds it would claim most of the disk.",
        "jetstream {",
        f"  store_dir: {quote(str(store_dir))}",
        "  max_memory_store: 64MB",
        "  max_file_store: 1GB",
        "}",
        "",
    ]
    if http_port is not None:
        lines += [
            "# Monitoring has no password: keep it on an address that only you reach.",
            f"http: {quote(f'{host}:{http_port}')}",
            "",
        ]
    if ports_dir is not None:
        lines += [f"ports_file_dir: {quote(str(ports_dir))}", ""]
    return "\n".join(lines) + render_users(identities)


def quote(text: str) -> str:
    """Quote a string so that the server reads exactly it.

    Raises:
        ValueError: it holds a control character.
    """
    if not text.isprintable():
        raise ValueError("a configuration value must be printable")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _secret(password: str) -> str:
    if not password:
        raise ValueError("a password must not be empty")
    return password if _ENVIRONMENT.fullmatch(password) else quote(password)


def _allow(verb: str, listed: tuple[str, ...]) -> list[str]:
    return [
        f"        {verb}: {{",
        "          allow: [",
        *(f"            {quote(subject)}" for subject in listed),
        "          ]",
        "        }",
    ]


def _user(identity: Identity) -> list[str]:
    grant = permissions(identity)
    lines = [
        f"    # {identity.kind}",
        "    {",
        f"      user: {quote(subjects.valid_identity(identity.name))}",
        f"      password: {_secret(identity.password)}",
        "      permissions: {",
        *_allow("subscribe", grant.subscribe),
        *_allow("publish", grant.publish),
    ]
    if grant.responses:
        lines += [
            "        # As many frames as an answer has; the time bounds how long one may take.",
            '        allow_responses: { max: -1, expires: "24h" }',
        ]
    return [*lines, "      }", "    }"]
