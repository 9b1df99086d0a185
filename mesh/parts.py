"""What `mesh up` starts: the identities, command lines and environments of all its processes.

Secrets go into environments only; a command line can be read by everybody on the host.
"""

import os
import secrets
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from mesh.errors import CommandError
from mesh.following import worker_module
from shared.broker import Identity

__all__ = (
    "COMMANDS",
    "UP",
    "Speculation",
    "UpSettings",
    "base_url",
    "child_environment",
    "identities",
    "requantize_command",
    "router_command",
    "shape_command",
    "threads_for",
    "worker_command",
)

_Kind = Literal["router", "worker", "mesh"]
Speculation = Literal["auto", "ngram", "off"]

UP = "mesh-1"
"""Who `mesh up` itself is."""
COMMANDS = "mesh-2"
"""Who `mesh status` and its like are."""
_OWN_SETTINGS = frozenset(
    f"MESH_{name}"
    for name in ("PORT", "ROUTERS", "WORKERS", "MODEL", "NATS", "DATA_DIR", "SLOTS", "THREADS")
) | {"MESH_CTX", "MESH_HOST", "MESH_NAME", "MESH_MODELS", "MESH_SPECULATION"}


class UpSettings(msgspec.Struct, frozen=True):
    """What `mesh up` was asked for."""

    data_dir: Path
    port: int = 9337
    routers: int = 1
    workers: int = 1
    models: tuple[str, ...] = ()
    nats: str = ""
    slots: int | None = None
    threads: int | None = None
    context: int | None = None
    speculation: Speculation | None = None
    # What only routers are told; None leaves it to them.
    max_rtt: float | None = None
    far: bool | None = None
    load_bound: float | None = None


def base_url(port: int) -> str:
    """What an OpenAI client is given."""
    return f"http://127.0.0.1:{port}/v1"


def identities(routers: int, workers: int, commands: int = 1) -> tuple[Identity, ...]:
    """Users for so many processes of each kind, with passwords nobody has seen before."""
    wanted: tuple[tuple[_Kind, int], ...] = (
        ("router", routers),
        ("worker", workers),
        ("mesh", commands),
    )
    return tuple(
        Identity(name=f"{kind}-{number}", kind=kind, password=secrets.token_urlsafe(24))
        for kind, count in wanted
        for number in range(1, count + 1)
    )


def threads_for(workers: int, cores: int) -> int:
    """Threads of each worker, one core left to the other parts where there is more than one."""
    return max(1, (cores - 1) // workers)


def child_environment(nats: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a router or worker: ours, without what was meant for `mesh up`."""
    kept = {name: value for name, value in environment.items() if name not in _OWN_SETTINGS}
    return kept | {"MESH_NATS": nats}


def router_command(name: str, port: int, settings: UpSettings) -> list[str]:
    """The command line of one router."""
    command = [_script("mesh-router", "router"), "--name", name, "--port", str(port)]
    if settings.max_rtt is not None:
        command += ["--max-rtt", str(settings.max_rtt)]
    if settings.far is not None:
        command.append("--far" if settings.far else "--no-far")
    if settings.load_bound is not None:
        command += ["--load-bound", str(settings.load_bound)]
    return command


def worker_command(name: str, models: Path, settings: UpSettings, cores: int) -> list[str]:
    """The command line of one worker; `models` is the folder with the generated `models.toml`."""
    threads = settings.threads or threads_for(settings.workers, cores)
    command = [_script("mesh-worker", "worker"), "--name", name, "--models", str(models)]
    command += ["--pin-all", "--threads", str(threads)]
    if settings.slots is not None:
        command += ["--slots", str(settings.slots)]
    if settings.context is not None:
        command += ["--ctx", str(settings.context)]
    if settings.speculation is not None:
        command += ["--speculation", settings.speculation]
    return command


def requantize_command(source: Path, target: Path, file_type: str, *, force: bool) -> list[str]:
    """The command line of the process that writes a model in another format.

    Raises:
        CommandError: llama.cpp is not installed here.
    """
    command = worker_module("worker.engine.requantize", needs="llama_cpp")
    command += ["--type", file_type, *(["--force"] if force else [])]
    return [*command, "--", str(source), str(target)]


def shape_command(model: str, *draft: str) -> list[str]:
    """The command line of the process that reads a model's shape, and what its draft model takes.

    Raises:
        CommandError: the worker's part is not installed here.
    """
    return [*worker_module("worker.shape"), model, *draft]


def _script(name: str, extra: str) -> str:
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise CommandError(f"{name} is not installed; install mesh-inference[{extra}]")
    return found
