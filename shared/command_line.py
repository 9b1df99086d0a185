"""What the three commands have in common: where settings come from, and how errors end them.

Settings come from flags, then `MESH_*` variables, then one TOML file. Whatever is wrong with them
is one line on stderr, without a traceback, and exit code 2; what fails later is exit code 1.
"""

import os
import secrets
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import cyclopts
import structlog
from cyclopts import App
from cyclopts.config import Dict

from shared.bus import BusUnavailable
from shared.subjects import valid_identity

__all__ = (
    "CommandFailed",
    "Level",
    "Refused",
    "identity",
    "log_to_stderr",
    "run_command",
    "settings_from_file",
)

Level = Literal["debug", "info", "warning", "error"]


class CommandFailed(Exception):
    """The command cannot do its work; the message is one line for a person."""


class Refused(CommandFailed):
    """A setting is wrong."""


def run_command(app: App, program: str, arguments: Sequence[str] | None) -> int:
    """Run a command line, `sys.argv`'s by default, and return its exit code."""
    try:
        result = run_tokens(app.meta, sys.argv[1:] if arguments is None else arguments)
    except cyclopts.CycloptsError as error:
        return _complain(program, " ".join(str(error).split()), 2)
    except Refused as error:
        return _complain(program, str(error), 2)
    except (CommandFailed, BusUnavailable) as error:
        return _complain(program, str(error), 1)
    return result


def run_tokens(app: App, tokens: Sequence[str]) -> int:
    """Run an app; what it raises is the caller's."""
    result = app(list(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    return result if isinstance(result, int) else 0


def _complain(program: str, message: str, code: int) -> int:
    sys.stderr.write(f"{program}: {message}\n")
    return code


def settings_from_file(path: Path | None, table: str = "") -> list[Dict]:
    """Sources of settings from a TOML file: the table, and `nats` from the file's top.

    Without `table`, each command of the app has the table of its name. Other parts of the mesh may
    keep their tables in the same file.

    Raises:
        Refused: the file cannot be read, or is no TOML.
    """
    if path is None:
        return []
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"{path}: {error}") from None
    common: dict[str, Any] = {key: data[key] for key in ("nats",) if key in data}
    if table:
        return [
            Dict(data, root_keys=(table,), source=str(path)),
            Dict(common, source=str(path)),
        ]
    return [
        Dict(data, source=str(path)),
        # Not every command has to do with NATS.
        Dict(common, source=str(path), use_commands_as_keys=False, allow_unknown=True),
    ]


def identity(kind: str, url: str, name: str = "") -> str:
    """Who to be at a NATS server: the name given, else the user of the URL, else a random one.

    The user's, because a server grants each user its own subjects only.

    Raises:
        Refused: that is no identity of a mesh.
    """
    chosen = name or _user(url)
    try:
        return valid_identity(chosen) if chosen else f"{kind}-{secrets.token_hex(4)}"
    except ValueError as error:
        source = "--name" if name else "the user in the NATS URL"
        raise Refused(f"{source}: {error}") from None


def _user(url: str) -> str:
    """The user a NATS URL names; a URL with a user but no password holds a token, a secret."""
    first = url.split(",")[0].strip()
    try:
        split = urlsplit(first if "://" in first else f"nats://{first}")
    except ValueError:
        # Bus.connect says what is wrong with it.
        return ""
    return unquote(split.username or "") if split.password is not None else ""


def log_to_stderr(level: Level) -> None:
    """Log from this level on, in colours where a person looks."""
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
