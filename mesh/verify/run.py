"""Running the checks one after the other, and what came of it."""

import time
from collections.abc import Callable, Collection, Sequence

import httpx
import msgspec

from mesh.errors import CommandError
from mesh.verify import cancel, conformance, failover, overload, streaming
from mesh.verify.check import Check
from mesh.verify.endpoint import Endpoint
from mesh.verify.finding import Failed, Fault, Finding, told
from mesh.verify.report import Report, Row
from shared.command_line import Refused

__all__ = ("Wanted", "all_checks", "chosen", "verify")


class Wanted(msgspec.Struct, frozen=True):
    """What is to be verified."""

    url: str
    """Base URL, ending in `/v1`."""
    model: str = ""
    """Empty: the first that is listed."""
    api_key: str = ""
    timeout: float = 60.0
    """Seconds within which each answer must be complete."""
    burst: int = 32
    streams: int = 8
    drain_pid: int | None = None
    kill_pid: int | None = None


def all_checks(wanted: Wanted) -> tuple[Check, ...]:
    """Every check there is, in the order in which they are run: those that hurt come last."""
    return (
        *conformance.CHECKS,
        *streaming.CHECKS,
        *cancel.CHECKS,
        *overload.checks(wanted.burst),
        *failover.checks(wanted.streams, wanted.drain_pid, wanted.kill_pid),
    )


def chosen(
    checks: Sequence[Check], only: Collection[str], skip: Collection[str]
) -> tuple[Check, ...]:
    """Those that are wanted; both name checks or whole groups, and `only` may be empty.

    Raises:
        Refused: a name is of no check and no group.
    """
    known = {name for check in checks for name in (check.name, check.group)}
    for name in (*only, *skip):
        if name not in known:
            groups = ", ".join(dict.fromkeys(check.group for check in checks))
            raise Refused(
                f"{name!r} is no check; wanted a group ({groups}), or a check as the report "
                "names it"
            )
    return tuple(
        check
        for check in checks
        if (not only or {check.name, check.group} & set(only))
        and not {check.name, check.group} & set(skip)
    )


async def verify(
    wanted: Wanted, checks: Sequence[Check], progress: Callable[[Check], None] = lambda _: None
) -> Report:
    """Run the checks; `progress` is called before each.

    Raises:
        CommandError: nobody answers at the URL, or it names no model and none was given.
    """
    headers = {"Authorization": f"Bearer {wanted.api_key}"} if wanted.api_key else {}
    async with httpx.AsyncClient(
        base_url=wanted.url,
        headers=headers,
        # The whole answer has a limit of its own.
        timeout=httpx.Timeout(None, connect=min(10.0, wanted.timeout)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
    ) as client:
        model = wanted.model or await _first_model(client, wanted)
        endpoint = Endpoint(client, model, wanted.timeout)
        rows = []
        for check in checks:
            progress(check)
            rows.append(await _row(check, endpoint))
    return Report(wanted.url, model, tuple(rows))


async def _row(check: Check, endpoint: Endpoint) -> Row:
    began = time.monotonic()
    finding: Finding
    try:
        finding = await check.run(endpoint)
    except Fault as fault:
        finding = Failed(str(fault))
    outcome, detail = told(finding)
    return Row(check.name, check.about, outcome, round(time.monotonic() - began, 3), detail)


async def _first_model(client: httpx.AsyncClient, wanted: Wanted) -> str:
    try:
        listed = (await Endpoint(client, "", wanted.timeout).models()).data
    except Fault as fault:
        raise CommandError(f"{wanted.url}: {fault}; is the URL right? --model names one") from None
    if not listed:
        raise CommandError(f"{wanted.url} serves no model; --model names one")
    return listed[0].id
