"""`mesh-worker`: the command line of one GPU host.

`shared.command_line` says where settings come from.
"""

import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import uvloop
from cyclopts import App, Parameter
from cyclopts.config import Env
from cyclopts.validators import Number

from shared import __version__
from shared.command_line import (
    Level,
    Refused,
    identity,
    log_to_stderr,
    run_command,
    run_tokens,
    settings_from_file,
)
from shared.replicas import DEFAULT_TIMING
from shared.sizes import parse_size
from worker.agent import Agent, AgentSettings
from worker.catalog import ModelSource, Speculation, read_catalog
from worker.engine_process import ENGINE_COMMAND
from worker.link import BatchInvariance
from worker.preparing import ServingSettings

__all__ = ("app", "main")


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


@app.default
def serve(
    *,
    models: Path,
    nats: str = "nats://127.0.0.1:4222",
    model: Annotated[tuple[str, ...], Parameter(negative_iterable="", show_default=False)] = (),
    pin_all: Annotated[bool, Parameter(negative=())] = False,
    memory: _Text = "",
    slots: _Positive = 8,
    threads: _NotNegative = 0,
    ctx: _NotNegative = 0,
    gpu_layers: Annotated[int | None, Parameter(validator=Number(gte=-1))] = None,
    speculation: Speculation = "auto",
    batch_invariant: BatchInvariance = "auto",
    prefix_memory: str = "",
    activations: Literal["f32", "f16"] = "f32",
    queue: _NotNegative = 64,
    grace: Annotated[float, Parameter(validator=Number(gte=0))] = 30.0,
    idle_after: Annotated[float, Parameter(validator=Number(gt=0))] = DEFAULT_TIMING.idle_after,
    name: _Text = "",
    cache: Path | None = None,
    log_level: Level = "info",
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
        Model to serve at once and always: a name or alias in the folder, a path, or
        hf:owner/repo:file.gguf. May be repeated. Without it the worker is a standby: it takes up
        those models of the folder that are in demand, and lets them go again.
    pin_all
        Serve all models of the folder at once and always.
    memory
        Memory for all models together, for example 2GiB. Without it, what the host has free.
    slots
        Sequences decoded at once, per model.
    threads
        Threads of an engine; 0 lets it choose.
    ctx
        Tokens of context for one sequence; 0 takes what the model was trained with, at most 4096.
    gpu_layers
        Layers on the GPU, -1 for all. Without it, as many as fit into what it has free.
    prefix_memory
        Host memory per model for the KV of conversations whose slots were needed by others, so
        that they go on without being computed again; 0 keeps none. Without it, a quarter of the
        worker's memory, at most 4GiB.
    speculation
        Drafting tokens ahead: auto with a draft model, where there is one, and n-gram lookup;
        ngram with lookup alone; off.
    batch_invariant
        on: what other requests do never changes a token of an answer, nor does the worker that
        gives it. A stream that is alone then takes up to 1.7 times as long; auto does it for
        weights of 32 bits, where it is 1.3.
    activations
        How the activations of a model that several workers carry travel between them, where this
        one is the head. f16 halves the traffic; answers are then not to the letter one host's.
    queue
        Requests that may wait per model when all slots are taken.
    grace
        Seconds that running requests are given on SIGTERM; a second SIGTERM ends at once.
    idle_after
        Seconds after its last use at which a standby lets go of a model.
    name
        Identity of this worker. Without it, the user in the NATS URL, else worker-XXXXXXXX.
    cache
        Folder for models downloaded from the hub. Without it, huggingface_hub's own.
    log_level
        What is logged to stderr.
    """
    log_to_stderr(log_level)
    settings = AgentSettings(
        url=nats,
        identity=identity("worker", nats, name),
        memory=_size(memory, "--memory"),
        grace=grace,
        timing=DEFAULT_TIMING._replace(idle_after=idle_after),
        serving=ServingSettings(
            slots=slots,
            queue=queue,
            context=ctx,
            threads=threads,
            gpu_layers=gpu_layers,
            speculation=speculation,
            batch_invariant=batch_invariant,
            prefix_memory=_prefix_memory(prefix_memory),
            half=activations == "f16",
            cache=cache,
            command=tuple(shlex.split(engine_command)) or ENGINE_COMMAND,
        ),
    )
    if pin_all and model:
        raise Refused("--pin-all and --model: wanted one of them")
    sources = read_catalog(models).choose(model)
    if pin_all or model:
        uvloop.run(_run(settings, sources, ()))
    else:
        uvloop.run(_run(settings, (), sources))
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
    app.config = (Env("MESH_"), *settings_from_file(config, "worker"))
    return run_tokens(app, tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mesh-worker` and return its exit code."""
    return run_command(app, "mesh-worker", arguments)


async def _run(
    settings: AgentSettings, pinned: Sequence[ModelSource], roles: Sequence[ModelSource]
) -> None:
    agent = Agent(settings, pinned, roles)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    await agent.run()


def _prefix_memory(text: str) -> int | None:
    """None: as much as is usual."""
    return 0 if text == "0" else _size(text, "--prefix-memory") or None


def _size(text: str, flag: str) -> int:
    if not text:
        return 0
    try:
        return parse_size(text)
    except ValueError as error:
        raise Refused(f"{flag}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
