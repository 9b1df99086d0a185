"""`mesh kubernetes-secrets`: a NATS user for each pod, as the Secrets of infra/kubernetes.

Pods read one entry each, named after the pod; the NATS servers read all users and their own routes.
"""

import base64
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote as percent

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number

from mesh.parts import identities
from shared.broker_config import Identity, quote, render_users

__all__ = ("ROUTE_USER", "cluster_part", "register", "secret_list")

ROUTE_USER = "route"
_OF_KIND = {"router": "mesh-routers", "worker": "mesh-workers", "mesh": "mesh-operator"}
"""The Secret that holds what processes of a kind are given."""

_Count = Annotated[int, Parameter(validator=Number(gte=0))]


def register(app: App) -> None:
    """Add the command."""

    @app.command
    def kubernetes_secrets(
        *,
        routers: _Count = 2,
        workers: _Count = 16,
        commands: _Count = 1,
        servers: Annotated[int, Parameter(validator=Number(gte=1))] = 3,
        release: str = "nats",
        namespace: str = "mesh",
    ) -> None:
        """Print the Secrets that infra/kubernetes needs, for `kubectl apply -f -`.

        The users are router-1, worker-1, mesh-1 and so on, as the pods are, with new passwords.
        Applied again, it changes all of them: restart the pods of NATS, routers and workers then.

        Parameters
        ----------
        routers
            Users for routers: at least the replicas of the StatefulSet `router`.
        workers
            Users for workers: at least the maxReplicaCount of the ScaledObject `worker`.
        commands
            Users for `mesh status` and `mesh models`.
        servers
            NATS servers of the cluster.
        release
            Name of the NATS chart's release, after which its pods and its Service are named.
        namespace
            Namespace of all of it.
        """
        listed = secret_list(
            identities(routers, workers, commands),
            route_password=secrets.token_urlsafe(24),
            servers=servers,
            release=release,
            namespace=namespace,
        )
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(listed)).decode() + "\n")


def secret_list(
    users: Sequence[Identity], *, route_password: str, servers: int, release: str, namespace: str
) -> dict[str, Any]:
    """The Secrets as a Kubernetes `List`.

    Args:
        users: everybody who may connect.
        route_password: what makes a server a peer of the others.
        servers: NATS servers.
        release: name of the NATS chart's release.
        namespace: of the Secrets.
    """
    files: dict[str, dict[str, str]] = {
        "mesh-nats": {
            "users.conf": render_users(users),
            "cluster.conf": cluster_part(route_password, servers, release),
        }
    } | {name: {} for name in _OF_KIND.values()}
    for user in users:
        url = f"nats://{user.name}:{percent(user.password, safe='')}@{release}:4222"
        files[_OF_KIND[user.kind]][f"{user.name}.toml"] = f'nats = "{url}"\n'
    items = [_secret(name, namespace, held) for name, held in files.items()]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def cluster_part(password: str, servers: int, release: str) -> str:
    """The part of a server's `cluster` block that holds its password and those of its routes."""
    addresses = (
        f"nats://{ROUTE_USER}:{percent(password, safe='')}@{release}-{n}.{release}-headless:6222"
        for n in range(servers)
    )
    listed = ", ".join(map(quote, addresses))
    return (
        f"authorization {{ user: {quote(ROUTE_USER)}, password: {quote(password)} }}\n"
        f"routes: [{listed}]\n"
    )


def _secret(name: str, namespace: str, files: Mapping[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/part-of": "mesh"},
        },
        "data": {key: base64.b64encode(text.encode()).decode() for key, text in files.items()},
    }
