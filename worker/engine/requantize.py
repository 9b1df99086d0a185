"""`python -m worker.engine.requantize SRC DST --type Q4_0`: writes a model in another format.

A process of its own, started by `mesh models requantize`. It tells on stdout, a line each,
`tensor N COUNT` before every tensor and `done BYTES` at the end. What is wrong is one line on
stderr, with exit code 2 if it was asked for wrongly and 1 if it failed.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import llama_cpp.llama_cpp as ll

from worker.gguf_header import GgufError, read_header

__all__ = ("FILE_TYPES", "RequantizeError", "WrongRequest", "main", "requantize")

FILE_TYPES: dict[str, int] = {
    "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": ll.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q5_0": ll.LLAMA_FTYPE_MOSTLY_Q5_0,
    "Q5_1": ll.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
    "F16": ll.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": ll.LLAMA_FTYPE_MOSTLY_BF16,
    "F32": ll.LLAMA_FTYPE_ALL_F32,
    "Q2_K": ll.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_S": ll.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "Q3_K_M": ll.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q3_K_L": ll.LLAMA_FTYPE_MOSTLY_Q3_K_L,
    "Q4_K_S": ll.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_K_M": ll.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_S": ll.LLAMA_FTYPE_MOSTLY_Q5_K_S,
    "Q5_K_M": ll.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": ll.LLAMA_FTYPE_MOSTLY_Q6_K,
}
"""Formats that need no importance matrix, by the names that files carry."""

_SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""As llama-quantize understands them."""

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_FULL = 1 << 20
"""Free bytes below which a disk is called full."""


class RequantizeError(Exception):
    """The file cannot be written; the message is one line."""


class WrongRequest(RequantizeError):
    """It was asked for wrongly; nothing has been touched."""


def requantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    force: bool = False,
    threads: int = 0,
    tell: Callable[[int, int], None] = lambda number, count: None,
) -> int:
    """Write `source` as `file_type` to `target` and return the target's size in bytes.

    The target appears when it is complete: until then its bytes are in a hidden file beside it,
    which is removed whatever goes wrong. Blocks; llama.cpp's log goes nowhere afterwards.

    Args:
        source: a GGUF file, of a split model the first part. May be quantized already.
        target: the file to write, never split.
        file_type: one of `FILE_TYPES`, in any case.
        force: replace the target if it is there.
        threads: 0: the cores this process may use.
        tell: called with a tensor's number, from 1, and how many there are, before each. It must
            not raise: llama.cpp, which calls it, cannot be stopped.

    Raises:
        WrongRequest: unknown type, no target folder, or a target that must not be replaced.
        GgufError: the source is not there, or no model.
        RequantizeError: llama.cpp could not, with its own last words.
    """
    code = _check(source, target, file_type, force=force)
    read_header(source)
    partial = _partial(target)
    try:
        partial.touch()
    except OSError as error:
        raise RequantizeError(f"{target}: {error.strerror or error}") from None
    try:
        _quantize(source, partial, code, threads, tell)
        size = partial.stat().st_size
        partial.replace(target)
    except OSError as error:
        raise RequantizeError(f"{target}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return size


def _partial(target: Path) -> Path:
    # Not called *.gguf, which a worker might take for a model. `mesh` removes it too, by this name,
    # should this process be killed.
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def _check(source: Path, target: Path, file_type: str, *, force: bool) -> int:
    name = file_type.upper()
    code = FILE_TYPES.get(_SHORT.get(name, name))
    if code is None:
        raise WrongRequest(f"--type {file_type}: wanted one of {', '.join(FILE_TYPES)}")
    if not target.parent.is_dir():
        raise WrongRequest(f"{target}: the folder {target.parent} is not there")
    if target.is_dir():
        raise WrongRequest(f"{target} is a folder; wanted the name of a file")
    if target.exists():
        if source.exists() and target.samefile(source):
            raise WrongRequest(f"{target} is the source itself; wanted another name")
        if not force:
            raise WrongRequest(f"{target} is there already; --force replaces it")
    return code


def _quantize(
    source: Path, partial: Path, code: int, threads: int, tell: Callable[[int, int], None]
) -> None:
    params = ll.llama_model_quantize_default_params()
    params.ftype = code
    params.allow_requantize = True
    params.nthread = threads or len(os.sched_getaffinity(0))
    errors: list[str] = []

    @ll.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        if level == _ERROR:
            errors.append(line.strip())
        elif match := _TENSOR.match(line):
            tell(int(match[1]), int(match[2]))

    ll.llama_log_set(hear, None)
    try:
        failed = ll.llama_model_quantize(os.fsencode(source), os.fsencode(partial), params)
    finally:
        ll.llama_log_set(_deaf, None)
    if failed:
        words = " ".join(" ".join(errors).split()) or "llama.cpp did not say why"
        if shutil.disk_usage(partial.parent).free < _FULL:
            words = f"the disk is full ({words})"
        raise RequantizeError(f"{source.name}: {words}")


@ll.llama_log_callback  # type: ignore[untyped-decorator]
def _deaf(level: int, text: bytes, _: Any) -> None:
    """Takes the place of a callback that is about to be freed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Requantize as the command line says and return the exit code.

    The work is done beside the main thread, which alone can take a signal while llama.cpp is busy
    with a tensor: SIGINT and SIGTERM end the process at once and leave nothing behind.
    """
    parser = argparse.ArgumentParser(prog="worker.engine.requantize")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", required=True, dest="file_type")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args(arguments)
    outcome: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    worker = threading.Thread(target=lambda: outcome.append(_work(asked)), daemon=True)
    try:
        worker.start()
        worker.join()
    except KeyboardInterrupt:
        _leave(asked.target, 130)
    return outcome[0] if outcome else 1


def _work(asked: argparse.Namespace) -> int:
    def say(line: str) -> None:
        try:
            print(line, flush=True)  # noqa: T201 - it is how the parent hears of it
        except OSError:
            _leave(asked.target, 1)  # nobody listens any more

    try:
        size = requantize(
            asked.source,
            asked.target,
            asked.file_type,
            force=asked.force,
            threads=asked.threads,
            tell=lambda number, count: say(f"tensor {number} {count}"),
        )
    except (RequantizeError, GgufError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, WrongRequest) else 1
    say(f"done {size}")
    return 0


def _leave(target: Path, code: int) -> NoReturn:
    """End at once, while llama.cpp's threads write to what then has no name any more."""
    _partial(target).unlink(missing_ok=True)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
