"""`mesh verify` on the command line; what needs an HTTP client is imported when it is run."""

import asyncio
import importlib.util
import os
import sys
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.text import Text

from mesh.errors import CommandError
from mesh.verify.report import report_view
from shared.command_line import Refused

__all__ = ("register",)

_Names = Annotated[tuple[str, ...], Parameter(negative_iterable="", show_default=False)]
_Pid = Annotated[int | None, Parameter(validator=Number(gt=1), show_default=False)]


def register(app: App) -> None:
    """Add the command."""

    @app.command(name="verify")
    def verify_endpoint(
        url: str,
        /,
        *,
        model: Annotated[str, Parameter(show_default=False)] = "",
        api_key: Annotated[str, Parameter(show_default=False)] = "",
        timeout: Annotated[float, Parameter(validator=Number(gt=0))] = 60.0,
        only: _Names = (),
        skip: _Names = (),
        burst: Annotated[int, Parameter(validator=Number(gte=1, lte=1000))] = 32,
        streams: Annotated[int, Parameter(validator=Number(gte=1, lte=1000))] = 8,
        drain_pid: _Pid = None,
        kill_pid: _Pid = None,
        as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    ) -> int:
        """Check an OpenAI endpoint: conformance, streams, cancelling, overload, failover.

        Ends with 0 if nothing failed, 1 if something did, 2 if the command line is wrong.

        Parameters
        ----------
        url
            Base URL of the endpoint, as http://127.0.0.1:9337/v1; /v1 may be left out.
        model
            Name of the model to ask. Without it, the first that is served.
        api_key
            Key that the endpoint wants.
        timeout
            Seconds within which each answer must be complete.
        only
            Check or group of checks to run alone, as streaming or streaming.role. May be repeated.
        skip
            Check or group of checks to leave out. May be repeated.
        burst
            Requests at once in the overload check.
        streams
            Streams at once in the failover checks.
        drain_pid
            Process of the endpoint, on this host, to end with SIGTERM in the middle of streams.
        kill_pid
            Process of the endpoint, on this host, to kill (-9) in the middle of streams.
        as_json
            Print JSON.
        """
        if importlib.util.find_spec("httpx") is None:
            raise CommandError("httpx is not installed; install mesh-inference[demo]")
        from mesh.verify.run import Wanted, all_checks, chosen, verify

        wanted = Wanted(
            url=_base(url),
            model=model,
            api_key=api_key,
            timeout=timeout,
            burst=burst,
            streams=streams,
            drain_pid=_ours("--drain-pid", drain_pid),
            kill_pid=_ours("--kill-pid", kill_pid),
        )
        checks = chosen(all_checks(wanted), only, skip)
        if not checks:
            raise Refused("--skip: leaves no check to run")
        waiting = Console(stderr=True, highlight=False)
        with waiting.status("asking for the models") as line:
            report = asyncio.run(
                verify(
                    wanted,
                    checks,
                    lambda check: line.update(Text(f"{check.name}: {check.about}")),
                )
            )
        if as_json:
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
        else:
            Console(highlight=False).print(report_view(report))
        return 1 if report.count("fail") else 0


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Refused(f"{url!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise Refused(f"{url!r} is not a URL of an endpoint; wanted http://HOST:PORT/v1")
    # What people paste is often the address alone.
    return url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def _ours(flag: str, pid: int | None) -> int | None:
    """A process that exists, may be ended by us, and is not this one."""
    if pid is None:
        return None
    if pid == os.getpid():
        raise Refused(f"{flag} {pid}: that is mesh verify itself")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        raise Refused(f"{flag} {pid}: no such process on this host") from None
    except PermissionError:
        raise Refused(f"{flag} {pid}: that process is another user's") from None
    except OverflowError:
        raise Refused(f"{flag} {pid}: wanted a process id") from None
    return pid
