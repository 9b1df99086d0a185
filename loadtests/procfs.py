"""What the kernel says of processes: CPU seconds, resident memory, children.

CPU is user plus system time of a process and all its descendants, so that a design of several
processes is charged for every one of them.
"""

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import msgspec

__all__ = (
    "Cost",
    "cost_of",
    "costs_of",
    "descendants",
    "name_of",
    "raise_open_files",
    "spent",
)

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Cost(msgspec.Struct, frozen=True):
    """CPU seconds since the start of the processes, and bytes they hold now."""

    cpu: float
    rss: int


def descendants(pid: int) -> list[int]:
    """Return `pid` and the processes below it; one that ended meanwhile is left out."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        try:
            for task in os.listdir(f"/proc/{current}/task"):
                children = Path(f"/proc/{current}/task/{task}/children").read_text()
                waiting += map(int, children.split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(current)
    return found


def cost_of(pid: int, *, alone: bool = False) -> Cost:
    """Return what `pid` and its descendants cost (`alone`: the process without them).

    Raises:
        ProcessLookupError: the process is gone.
    """
    cpu, rss, alive = 0.0, 0, False
    for member in [pid] if alone else descendants(pid):
        try:
            line = Path(f"/proc/{member}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = line.rsplit(")", 1)[1].split()
        own, reaped = fields[11:13], fields[13:15]
        cpu += sum(map(int, own if alone else own + reaped)) / _TICKS
        rss += int(fields[21]) * _PAGE
        alive = alive or member == pid
    if not alive:
        raise ProcessLookupError(f"process {pid} is gone")
    return Cost(cpu, rss)


def costs_of(pids: Mapping[str, int]) -> dict[str, Cost]:
    """Return the cost of each named process tree."""
    return {name: cost_of(pid) for name, pid in pids.items()}


def spent(before: Mapping[str, Cost], after: Mapping[str, Cost], prefix: str) -> float:
    """Return the CPU seconds that all processes whose name begins with `prefix` used between."""
    return sum(after[name].cpu - before[name].cpu for name in before if name.startswith(prefix))


def name_of(pid: int) -> str:
    """Return the command line of a process, its words joined by blanks; empty when it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace").strip()


def raise_open_files(wanted: int) -> None:
    """Raise the limit of open files of this process and of those it starts.

    Raises:
        RuntimeError: the hard limit is below `wanted`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise RuntimeError(f"{wanted} open files wanted, the hard limit is {hard} (ulimit -Hn)")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
