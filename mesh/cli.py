"""`mesh`: the operator's command line.

`shared.command_line` says where settings come from.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
from cyclopts import App, Parameter
from cyclopts.config import Env
from cyclopts.validators import Number
from rich.console import Console

from mesh import kubernetes, model_settings, plan
from mesh.errors import CommandError
from mesh.fleet import Snapshot
from mesh.parts import Speculation, UpSettings, identities
from mesh.running import default_data_dir, find
from mesh.shard_commands import app as shard_app
from mesh.verify import command as verify_command
from mesh.worker_commands import app as worker_app
from shared import __version__
from shared.command_line import run_command, run_tokens, settings_from_file

__all__ = ("app", "main")

_Count = Annotated[int, Parameter(validator=Number(gte=1, lte=64))]
_Optional = Annotated[int | None, Parameter(validator=Number(gte=1), show_default=False)]
_Text = Annotated[str, Parameter(show_default=False)]
_DataDir = Annotated[Path | None, Parameter(show_default=False)]
_Json = Annotated[bool, Parameter(name="--json", negative=())]

app = App(
    name="mesh",
    version=__version__,
    help="Many hosts with llama.cpp, one OpenAI endpoint.",
    help_format="markdown",
    config=Env("MESH_", command=False),
)
app.meta.group_parameters = app.group_parameters


@app.command
def up(
    *,
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 9337,
    routers: _Count = 1,
    workers: _Count = 1,
    model: Annotated[tuple[str, ...], Parameter(negative_iterable="", show_default=False)] = (),
    nats: _Text = "",
    data_dir: _DataDir = None,
    slots: _Optional = None,
    threads: _Optional = None,
    ctx: _Optional = None,
    speculation: Annotated[Speculation | None, Parameter(show_default=False)] = None,
    max_rtt: Annotated[float | None, Parameter(validator=Number(gt=0), show_default=False)] = None,
    far: Annotated[bool | None, Parameter(show_default=False)] = None,
    load_bound: Annotated[
        float | None, Parameter(validator=Number(gt=1), show_default=False)
    ] = None,
) -> None:
    """Bring up a whole system on this host: NATS, routers, workers.

    What has no flag here reaches the parts by variables (MESH_GRACE=60 mesh up), or from the tables
    [router] and [worker] of the file that --config names.

    Parameters
    ----------
    port
        Port of the first router on 127.0.0.1; further routers take the next ones. 0: any free ones.
    routers
        Router processes.
    workers
        Worker processes; each serves every model.
    model
        Path of a GGUF file, hf:owner/repo:file.gguf, or a name. May be repeated. Without it,
        SmolLM2-135M-Instruct, which comes along.
    nats
        A NATS server that runs already, as nats://USER:PASSWORD@HOST:PORT. Without it, one is
        started, with a user of its own for each process.
    data_dir
        Folder for logs, NATS's data and the record that `mesh status` reads. Without it, mesh in
        the user's state folder.
    slots
        Sequences that a worker decodes at once, per model. Without it, the worker's own default.
    threads
        Threads of each worker. Without it, the cores but one, shared among the workers.
    ctx
        Tokens of context for one sequence. Without it, what the model was trained with, up to 4096.
    speculation
        Drafting tokens ahead: auto, with a draft model where a smaller relative lies beside the
        model; ngram, without; off. Without it, auto.
    max_rtt
        Milliseconds of round trip beyond which routers give a worker nothing while a nearer one
        serves. Without it, the routers' own default.
    far
        Let routers use workers beyond that where no nearer one serves the model.
    load_bound
        How far above the mean load a worker may be and still get its own conversations. Without
        it, the routers' own default.
    """
    from mesh.narrator import Narrator
    from mesh.up import bring_up

    settings = UpSettings(
        data_dir=_folder(data_dir),
        port=port,
        routers=routers,
        workers=workers,
        models=model,
        nats=nats,
        slots=slots,
        threads=threads,
        context=ctx,
        speculation=speculation,
        max_rtt=max_rtt,
        far=far,
        load_bound=load_bound,
    )
    asyncio.run(bring_up(settings, Narrator(Console(highlight=False))))


@app.command
def status(*, nats: _Text = "", data_dir: _DataDir = None, as_json: _Json = False) -> None:
    """Show routers, workers, their models, slots and load.

    Parameters
    ----------
    nats
        The system's NATS server. Without it, that of the running `mesh up`.
    data_dir
        The data folder of that `mesh up`.
    as_json
        Print JSON.
    """
    from mesh.tables import status_view

    snapshot = _listen(nats, data_dir)
    if as_json:
        _print_json(snapshot)
    else:
        Console(highlight=False).print(status_view(snapshot))


@app.command
def top(*, nats: _Text = "", data_dir: _DataDir = None) -> None:
    """Show the state of the system, the demand and the last role changes, live, until Ctrl-C.

    Parameters
    ----------
    nats
        The system's NATS server. Without it, that of the running `mesh up`.
    data_dir
        The data folder of that `mesh up`.
    """
    from mesh.top import watch

    console = Console(highlight=False)
    if not console.is_terminal:
        raise CommandError("mesh top needs a terminal; mesh status prints the state once")
    with suppress(KeyboardInterrupt):
        asyncio.run(watch(nats or find(_folder(data_dir)).nats, console))


models = App(name="models", help="Show the models, set their replicas, or write another format.")
app.command(models)
app.command(worker_app)
app.command(shard_app)


@models.default
def show_models(*, nats: _Text = "", data_dir: _DataDir = None, as_json: _Json = False) -> None:
    """Show the models, with their workers, context and state.

    Parameters
    ----------
    nats
        The system's NATS server. Without it, that of the running `mesh up`.
    data_dir
        The data folder of that `mesh up`.
    as_json
        Print JSON.
    """
    from mesh.tables import models_table

    snapshot = _listen(nats, data_dir)
    if as_json:
        _print_json(snapshot.models)
    else:
        Console(highlight=False).print(models_table(snapshot.models))


@models.command
def requantize(
    source: Path,
    target: Path,
    /,
    *,
    file_type: Annotated[str, Parameter(name="--type")],
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a model in another format: a faster or smaller one, or a draft for it.

    Parameters
    ----------
    source
        GGUF file; of a split model, the first part.
    target
        File to write.
    file_type
        Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, F32, or Q2_K to Q6_K.
    force
        Replace the target if it is there.
    """
    from mesh.requantize import run

    run(source, target, file_type, force=force, console=Console(stderr=True, highlight=False))


@app.command
def chat(
    model: str | None = None,
    /,
    *,
    url: _Text = "",
    system: _Text = "",
    temperature: Annotated[float, Parameter(validator=Number(gte=0, lte=2))] = 0.5,
    max_tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 1024,
    data_dir: _DataDir = None,
) -> None:
    """Talk to a model. Input that is not a terminal is one question.

    Parameters
    ----------
    model
        Name of a model. Without it, the first that is served.
    url
        Base URL of an OpenAI endpoint. Without it, that of the running `mesh up`, else
        http://127.0.0.1:9337/v1.
    system
        System message.
    temperature
        How freely tokens are drawn: 0 always takes the likeliest.
    max_tokens
        Most tokens of one answer.
    data_dir
        The data folder of that `mesh up`.
    """
    from mesh.chat import Manner, converse

    if not url:
        try:
            url = find(_folder(data_dir)).url
        except CommandError:
            url = "http://127.0.0.1:9337/v1"
    manner = Manner(system=system, temperature=temperature, max_tokens=max_tokens)
    converse(url, model, manner, sys.stdin, sys.stdout)


@app.command
def nats_config(
    *,
    routers: Annotated[int, Parameter(validator=Number(gte=0))] = 1,
    workers: Annotated[int, Parameter(validator=Number(gte=0))] = 1,
    commands: Annotated[int, Parameter(validator=Number(gte=0))] = 1,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Number(gte=1, lte=65535))] = 4222,
    store_dir: str = "nats-data",
) -> None:
    """Print a nats-server configuration with a user for each process, and new passwords.

    The users are router-1, worker-1, mesh-1 and so on; each worker has a second one, as
    worker-1-ring, for parts of models. Keep the output where only nats-server reads it.

    Parameters
    ----------
    routers
        Users for `mesh-router`.
    workers
        Users for `mesh-worker`.
    commands
        Users for `mesh status` and `mesh models`.
    host
        Address that nats-server listens on.
    port
        Port that nats-server listens on.
    store_dir
        Folder in which nats-server keeps its data.
    """
    from shared.broker import render

    users = identities(routers, workers, commands)
    sys.stdout.write(render(users, host=host, port=port, store_dir=store_dir))


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> int:
    """Read the settings and run the command.

    Parameters
    ----------
    config
        TOML file with the same settings, in a table of the command's name; nats may also stand at
        its top.
    """
    app.config = (Env("MESH_", command=False), *settings_from_file(config))
    if config is not None:
        # The processes that `mesh up` starts read their own tables of it.
        os.environ["MESH_CONFIG"] = str(config.resolve())
    return run_tokens(app, tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mesh` and return its exit code."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("error"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        return run_command(app, "mesh", arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _listen(nats: str, data_dir: Path | None) -> Snapshot:
    from mesh.listening import listen

    return asyncio.run(listen(nats or find(_folder(data_dir)).nats))


def _folder(data_dir: Path | None) -> Path:
    return (data_dir or default_data_dir()).expanduser().absolute()


def _print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(_whole(value))).decode() + "\n")


def _whole(value: Any) -> Any:
    """A struct as a dict with all its fields; on the wire, defaults are left out."""
    if isinstance(value, msgspec.Struct):
        return {name: _whole(part) for name, part in msgspec.structs.asdict(value).items()}
    return [_whole(part) for part in value] if isinstance(value, tuple) else value


model_settings.register(models, _folder)
plan.register(app, _folder)
kubernetes.register(app)
verify_command.register(app)

if __name__ == "__main__":
    sys.exit(main())
