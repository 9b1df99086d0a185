"""`mesh-router`: the command line of one router.

Settings come from flags, then `MESH_*` variables, then one TOML file. Whatever is wrong with them
is one line on stderr and an exit code that is not 0.
"""

import os
import secrets
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import cyclopts
import structlog
from cyclopts import App, Parameter
from cyclopts.config import Dict, Env
from cyclopts.validators import Number

from router.server import StartFailed, run
from router.settings import Settings
from shared import __version__
from shared.bus import BusUnavailable
from shared.subjects import valid_identity

__all__ = ("app", "main")

_TABLE = "router"
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}

_Level = Literal["debug", "info", "warning", "error"]
_Seconds = Annotated[float, Parameter(validator=Number(gt=0))]

app = App(
    name="mesh-router",
    version=__version__,
    help="Answer OpenAI's HTTP API from the workers of a mesh over NATS.",
    help_format="plaintext",
    config=Env("MESH_"),
)
app.meta.group_parameters = app.group_parameters


class _Refused(Exception):
    """A setting is wrong; the message is one line."""


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
    log_level: _Level = "info",
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
    log_level
        What is logged to stderr.
    """
    _set_up_log(log_level)
    return run(
        Settings(
            nats=nats,
            host=host,
            port=port,
            name=_identity(name, nats),
            max_body=_size(max_body),
            request_timeout=request_timeout,
            grace=grace,
            ping_interval=ping_interval,
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
    app.config = (Env("MESH_"), *_from_file(config))
    result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    return result if isinstance(result, int) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mesh-router` and return its exit code."""
    try:
        result = app.meta(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except cyclopts.CycloptsError as error:
        return _complain(" ".join(str(error).split()), 2)
    except _Refused as error:
        return _complain(str(error), 2)
    except (BusUnavailable, StartFailed) as error:
        return _complain(str(error), 1)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"mesh-router: {message}\n")
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
    """Bytes of a size as people write it: 500, 64KiB, 32 MiB, 1G."""
    lowered = text.strip().lower().removesuffix("b").removesuffix("i")
    number = lowered.rstrip("kmg")
    unit = lowered[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise _Refused(f"--max-body: {text!r} is not a size; wanted for example 32MiB")
    return size


def _identity(name: str, url: str) -> str:
    try:
        if name:
            return valid_identity(name)
        user = _user(url)
        return valid_identity(user) if user else f"router-{secrets.token_hex(4)}"
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
