"""Fetching a model from the Hugging Face hub, with its progress told.

`hf:owner/repo:file` names one GGUF in one repository; of a split model, the first part names all.
"""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from worker.gguf_header import split_parts

__all__ = (
    "DownloadStopped",
    "HubError",
    "HubSource",
    "address",
    "at_hand",
    "credentials",
    "fetch",
    "parse_source",
)

PREFIX = "hf:"

_SOURCE = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<file>[^:\s]+\.gguf)(?:@(?P<revision>\S+))?"
)


class HubError(Exception):
    """The file cannot be had; the message is one line."""


class DownloadStopped(Exception):
    """The worker is ending, and the download with it; what was fetched is kept."""


class HubSource(msgspec.Struct, frozen=True):
    """One file on the hub."""

    repo: str
    file: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name under which the model is served unless a catalog gives another."""
        return Path(self.file).name.removesuffix(".gguf")


def parse_source(text: str) -> HubSource:
    """Read `hf:owner/repo:file.gguf`, with `@revision` if wished.

    Raises:
        HubError: it is not of that form.
    """
    match = _SOURCE.fullmatch(text)
    if match is None or ".." in match["file"].split("/"):
        raise HubError(f"{text!r}: wanted hf:owner/repo:file.gguf")
    return HubSource(match["repo"], match["file"], match["revision"])


def at_hand(source: HubSource, cache: Path | None) -> Path | None:
    """The (first) file if all parts of the model have been fetched before; never asks the hub."""
    from huggingface_hub import try_to_load_from_cache

    paths = [
        try_to_load_from_cache(
            source.repo, part.as_posix(), cache_dir=cache, revision=source.revision
        )
        for part in split_parts(Path(source.file))
    ]
    found = [Path(path) for path in paths if isinstance(path, str)]
    return found[0] if len(found) == len(paths) else None


def address(source: HubSource) -> str:
    """URL of the (first) file, for reading parts of it."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(source.repo, source.file, revision=source.revision)


def credentials() -> dict[str, str]:
    """Headers that the hub knows the user by, if it does."""
    from huggingface_hub import get_token

    token = get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def fetch(
    source: HubSource,
    cache: Path | None,
    *,
    progress: Callable[[float], None],
    stop: threading.Event,
) -> Path:
    """Download what the cache lacks and return the path of the (first) file. Blocks.

    Args:
        source: what to fetch.
        cache: folder of the cache; None: huggingface_hub's own.
        progress: told the share of the current file that is there, 0 to 1, from this thread.
        stop: when set, the download ends within a moment.

    Raises:
        HubError: the hub cannot be reached, or has no such file.
        DownloadStopped: `stop` was set.
    """
    # Half a second to import, and most workers never download.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    parts = split_parts(Path(source.file))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    paths: list[Path] = []
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
        for part in parts:

            def bar(*_: Any, total: int | None = None, initial: int = 0, **__: Any) -> _Bar:
                return _Bar(shown, source.name, total, initial, progress, stop)

            try:
                path = hf_hub_download(
                    source.repo,
                    part.as_posix(),
                    revision=source.revision,
                    cache_dir=cache,
                    # It takes any callable that makes a bar, which its types do not say.
                    tqdm_class=cast(Any, bar),
                )
            except LocalEntryNotFoundError as error:
                raise HubError(f"{source.repo}: {part}: the hub cannot be reached") from error
            except (HfHubHTTPError, OSError, ValueError) as error:
                why = str(error).strip().splitlines()
                raise HubError(
                    f"{source.repo}: {part}: {why[0] if why else type(error).__name__}"
                ) from error
            paths.append(Path(path))
    return paths[0]


class _Bar:
    """What huggingface_hub takes for a tqdm: a task of a rich progress display."""

    def __init__(
        self,
        shown: Progress,
        name: str,
        total: int | None,
        initial: int,
        progress: Callable[[float], None],
        stop: threading.Event,
    ) -> None:
        self._shown = shown
        self._total = total
        self._done = float(initial)
        self._progress = progress
        self._stop = stop
        self._task = shown.add_task(name, total=total, completed=initial)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, count: float | None = 1) -> None:
        """Count bytes; the place where a download can be stopped."""
        if self._stop.is_set():
            raise DownloadStopped
        self._done += count or 0
        self._shown.update(self._task, completed=self._done)
        if self._total:
            self._progress(min(1.0, self._done / self._total))

    def close(self) -> None:
        """End the task's line."""
        self._shown.stop_task(self._task)
