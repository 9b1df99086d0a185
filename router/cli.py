"""`mesh-router`: the command line of one router.

`shared.command_line` says where settings come from.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.config import Env
from cyclopts.validators import Number

from router.server import run
from router.settings import Settings
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
from shared.sizes import parse_size

__all__ = ("app", "main")

_Seconds = Annotated[float, Parameter(validator=Number(gt=0))]

app = App(
    name="mesh-router",
    version=__version__,
    help="Answer OpenAI's HTTP API from the workers of a mesh over NATS.",
    help_format="plaintext",
    config=Env("MESH_"),
)
app.meta.group_parameters = app.group_parameters


@app.default
def serve(
    *,
    nats: str = "nats://127.0.0.1:4222",
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 9337,
    name: Annotated[str, Parameter(show_default=False)] = "",
    max_body: str = "32MiB",
    request_timeout: _Seconds = 600.0,
    grace: Annotated[float, Parameter(validator=Number(gte=0))] = 30.0,
    ping_interval: _Seconds = 10.0,
    stall_timeout: _Seconds = 10.0,
    nats_patience: Annotated[float, Parameter(validator=Number(gte=0))] = 15.0,
    resumes: Annotated[int, Parameter(validator=Number(gte=0))] = 3,
    idempotency_seconds: _Seconds = 600.0,
    idempotency_memory: str = "64MiB",
    retry_share: Annotated[float, Parameter(validator=Number(gte=0, lte=1))] = 0.2,
    max_rtt: _Seconds = 80.0,
    far: bool = False,
    load_bound: Annotated[float, Parameter(validator=Number(gt=1))] = 1.75,
    held_per_model: Annotated[int, Parameter(validator=Number(gte=0))] = 256,
    held_in_all: Annotated[int, Parameter(validator=Number(gte=0))] = 1024,
    wait_for_workers: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0,
    log_level: Level = "info",
) -> int:
    """Answer OpenAI's HTTP API from the workers of a mesh over NATS.

    Parameters
    ----------
    nats
        NATS server as nats://USER:PASSWORD@HOST:PORT; several separated by commas.
    host
        Address to listen on.
    port
        Port to listen on; 0 takes a free one.
    name
        Identity of this router. Without it, the user in the NATS URL, else router-XXXXXXXX.
    max_body
        Largest request body, for example 32MiB.
    request_timeout
        Seconds a request may take in all, unless it says otherwise by X-Request-Timeout.
    grace
        Seconds that open answers are given on SIGTERM; a second SIGTERM ends at once.
    ping_interval
        Seconds of silence after which a stream gets a comment that keeps its connection open.
    stall_timeout
        Seconds between two tokens of a stream after which it goes on on another worker, if there
        is one; after six times as many it is given up.
    nats_patience
        Seconds that answers which have been begun wait for NATS to come back; new requests get 503
        meanwhile.
    resumes
        How often an answer may go on on another worker when its own is lost; 0 switches it off.
    idempotency_seconds
        Seconds for which an answer is kept for requests with the same Idempotency-Key.
    idempotency_memory
        Memory for such answers, for example 64MiB; 0 ignores the header.
    retry_share
        Of all requests, how many may be tried anew when a worker fails them before their first
        token, beside 10 a second that always may; what is beyond fails at once.
    max_rtt
        Milliseconds of round trip beyond which a worker gets nothing while a nearer one serves.
    far
        Use workers beyond that where no nearer one serves the model, the nearest first.
    load_bound
        How far above the mean load a worker may be and still get its own conversations.
    held_per_model
        Requests that may wait for one model that is being brought up.
    held_in_all
        Requests that may wait for all such models together.
    wait_for_workers
        Seconds that a request for a known model is held although no worker is left that could load
        it; for where workers are started on demand.
    log_level
        What is logged to stderr.
    """
    log_to_stderr(log_level)
    return run(
        Settings(
            nats=nats,
            host=host,
            port=port,
            name=identity("router", nats, name),
            max_body=_size("max-body", max_body),
            request_timeout=request_timeout,
            grace=grace,
            ping_interval=ping_interval,
            stall_timeout=stall_timeout,
            nats_patience=nats_patience,
            resumes=resumes,
            idempotency_seconds=idempotency_seconds,
            idempotency_memory=0
            if idempotency_memory == "0"
            else _size("idempotency-memory", idempotency_memory),
            retry_share=retry_share,
            max_rtt=max_rtt / 1000,
            far=far,
            load_bound=load_bound,
            held_per_model=held_per_model,
            held_in_all=held_in_all,
            wait_for_workers=wait_for_workers,
        )
    )


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(env_var="MESH_CONFIG")] = None,
) -> int:
    """Read the settings and start.

    Parameters
    ----------
    config
        TOML file with the same settings in a table [router]; nats may also stand at its top.
    """
    app.config = (Env("MESH_"), *settings_from_file(config, "router"))
    return run_tokens(app, tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mesh-router` and return its exit code."""
    return run_command(app, "mesh-router", arguments)


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise Refused(f"--{option}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
