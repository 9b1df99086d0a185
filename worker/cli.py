"""`mesh-worker`: the command line of one GPU host.

Settings come from flags, then `MESH_*` variables, then one TOML file. Whatever is wrong with them
is one line on stderr and an exit code that is not 0.
"""

import asyncio
import os
import secrets
import shlex
import signal
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import cyclopts
import structlog
import uvloop
from cyclopts import App, Parameter
from cyclopts.config import Dict, Env
from cyclopts.validators import Number

from shared import __version__
from shared.bus import BusUnavailable
from shared.subjects import valid_identity
from worker import hardware
from worker.agent import Agent, AgentFailed, AgentSettings
from worker.catalog import CatalogError, ModelSource, read_catalog
from worker.engine_process import ENGINE_COMMAND
from worker.memory_budget import parse_size
from worker.preparing import ServingSettings

__all__ = ("app", "main")

_TABLE = "worker"
_ALL_LAYERS = -1

_Level = Literal["debug", "info", "warning", "error"]
_Positive = Annotated[int, Parameter(validator=Number(gte=1))]
_Text = Annotated[str, Parameter(show_default=False)]
_NotNegative = Annotated[int, Parameter(validator=Number(gte=0))]

app = App(
    name="mesh-worker",
    version=__version__,
    help="Serve GGUF models of this host to a mesh over NATS.",
    help_format="plaintext",
    config=Env("MESH_"),
)
app.meta.group_parameters = app.group_parameters


class _Refused(Exception):
    """A setting is wrong; the message is one line."""


@app.default
def serve(
    *,
    models: Path,
    nats: str = "nats://127.0.0.1:4222",
    model: Annotated[tuple[str, ...], Parameter(negative_iterable="", show_default=False)] = (),
    memory: _Text = "",
    slots: _Positive = 8,
    threads: _NotNegative = 0,
    ctx: _NotNegative = 0,
    gpu_layers: Annotated[int | None, Parameter(validator=Number(gte=-1))] = None,
    queue: _NotNegative = 64,
    grace: Annotated[float, Parameter(validator=Number(gte=0))] = 30.0,
    name: _Text = "",
    cache: Path | None = None,
    log_level: _Level = "info",
    engine_command: Annotated[str, Parameter(show=False)] = "",
) -> int:
    """Serve GGUF models of this host to a mesh over NATS.

    Parameters
    ----------
    models
        Folder with *.gguf files, and maybe a models.toml that names them.
    nats
        NATS server as nats://USER:PASSWORD@HOST:PORT; several separated by commas.
    model
        Model to serve: a name or alias in the folder, a path, or hf:owner/repo:file.gguf. May be
        repeated. Without it, all models of the folder are served.
    memory
        Memory for all models together, for example 2GiB. Without it, what the host has free.
    slots
        Sequences decoded at once, per model.
    threads
        Threads of an engine; 0 lets it choose.
    ctx
        Tokens of context for one sequence; 0 takes what the model was trained with, at most 4096.
    gpu_layers
        Layers on the GPU, -1 for all. Without it, all if there is a GPU.
    queue
        Requests that may wait per model when all slots are taken.
    grace
        Seconds that running requests are given on SIGTERM; a second SIGTERM ends at once.
    name
        Identity of this worker. Without it, the user in the NATS URL, else worker-XXXXXXXX.
    cache
        Folder for models downloaded from the hub. Without it, huggingface_hub's own.
    log_level
        What is logged to stderr.
    """
    _set_up_log(log_level)
    settings = AgentSettings(
        url=nats,
        identity=_identity(name, nats),
        memory=_size(memory),
        grace=grace,
        serving=ServingSettings(
            slots=slots,
            queue=queue,
            context=ctx,
            threads=threads,
            gpu_layers=_gpu_layers(gpu_layers),
            cache=cache,
            command=tuple(shlex.split(engine_command)) or ENGINE_COMMAND,
        ),
    )
    sources = read_catalog(models).choose(model)
    uvloop.run(_run(settings, sources))
    return 0


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(env_var="MESH_CONFIG")] = None,
) -> int:
    """Read the settings and start.

    Parameters
    ----------
    config
        TOML file with the same settings in a table [worker]; nats may also stand at its top.
    """
    app.config = (Env("MESH_"), *_from_file(config))
    result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    return result if isinstance(result, int) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mesh-worker` and return its exit code."""
    try:
        result = app.meta(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except cyclopts.CycloptsError as error:
        return _complain(" ".join(str(error).split()), 2)
    except (_Refused, CatalogError) as error:
        return _complain(str(error), 2)
    except (BusUnavailable, AgentFailed) as error:
        return _complain(str(error), 1)
    return result if isinstance(result, int) else 0


async def _run(settings: AgentSettings, sources: Sequence[ModelSource]) -> None:
    agent = Agent(settings, sources)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    await agent.run()


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"mesh-worker: {message}\n")
    return code


def _from_file(path: Path | None) -> list[Dict]:
    if path is None:
        return []
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _Refused(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _Refused(f"{path}: {error}") from None
    # Other parts of the mesh may keep their tables in the same file; `nats` is for all of them.
    common: dict[str, Any] = {key: data[key] for key in ("nats",) if key in data}
    return [
        Dict(data, root_keys=(_TABLE,), source=str(path)),
        Dict(common, source=str(path)),
    ]


def _size(text: str) -> int:
    if not text:
        return 0
    try:
        return parse_size(text)
    except ValueError as error:
        raise _Refused(f"--memory: {error}") from None


def _gpu_layers(asked: int | None) -> int:
    if asked is None:
        return _ALL_LAYERS if hardware.gpus() else 0
    return asked


def _identity(name: str, url: str) -> str:
    try:
        if name:
            return valid_identity(name)
        user = _user(url)
        return valid_identity(user) if user else f"worker-{secrets.token_hex(4)}"
    except ValueError as error:
        raise _Refused(f"{error}; give one with --name") from None


def _user(url: str) -> str:
    """The user a NATS URL names; a URL with a user but no password holds a token, a secret."""
    first = url.split(",")[0].strip()
    try:
        split = urlsplit(first if "://" in first else f"nats://{first}")
    except ValueError:
        return ""
    return unquote(split.username or "") if split.password is not None else ""


def _set_up_log(level: _Level) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
                pad_event_to=0,
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    sys.exit(main())
