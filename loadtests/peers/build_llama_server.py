"""Builds llama-server and other programs of llama.cpp from the source package of llama-cpp-python.

The version is the one that constraints.txt pins, so that the peer has the very llama.cpp our engine
runs. pip fetches the package; what is built lies in a folder of that version and stays there.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec

__all__ = (
    "CACHE",
    "PROGRAMS",
    "BuildFailed",
    "Stamp",
    "batched_bench",
    "build",
    "built",
    "built_server",
    "configure_arguments",
    "percent_done",
    "pinned_version",
)

CACHE = Path("~/.cache/mesh-peers")
"""Where packages, builds and programs are kept; `~` is the user's home."""

PROGRAMS = ("llama-server", "llama-batched-bench", "llama-perplexity", "ggml-rpc-server")

AVOIDED = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -mno-avx512fp16"

OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",  # programs that can be moved
    # these three as infra/setup_env.py builds our own, which tells what is wrong with these
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",
    "CMAKE_C_FLAGS": AVOIDED,
    "CMAKE_CXX_FLAGS": AVOIDED,
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # else the build fetches a web page
}

_PERCENT = re.compile(r"\[\s*(\d{1,3})%\]")
_STEP = re.compile(r"\[\s*(\d+)/(\d+)\]")
_TAIL_LINES = 20
_QUIET_SECONDS = 15.0

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


class BuildFailed(Exception):
    """The peer could not be built; the message says at which step and why."""


class Stamp(msgspec.Struct, frozen=True):
    """What a finished build was made from; another one means: build again."""

    version: str
    options: dict[str, str]
    machine: str

    @classmethod
    def wanted(cls, version: str) -> "Stamp":
        """The stamp that a build of this version on this machine would bear."""
        return cls(version, OPTIONS, f"{platform.system()} {platform.machine()}")


def pinned_version(constraints: str) -> str:
    """Return the version of llama-cpp-python that the text of a constraints file pins.

    Raises:
        BuildFailed: none is pinned.
    """
    for line in constraints.splitlines():
        name, _, version = line.split("#")[0].strip().partition("==")
        if re.sub(r"[-_.]+", "-", name.strip()).lower() == "llama-cpp-python" and version:
            return version.strip()
    raise BuildFailed("constraints.txt pins no llama-cpp-python; a line name==version is needed")


def configure_arguments(source: Path, build_folder: Path) -> list[str]:
    """Return the command that lets CMake prepare llama.cpp of the unpacked package."""
    llama = source / "vendor" / "llama.cpp"
    settings = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    return ["cmake", "-S", str(llama), "-B", str(build_folder), *settings]


def percent_done(line: str) -> int | None:
    """Return how far a line of make's or ninja's output says the build is, None if it does not."""
    if match := _PERCENT.search(line):
        return int(match[1])
    if (match := _STEP.search(line)) and int(match[2]):
        return int(match[1]) * 100 // int(match[2])
    return None


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._started = time.monotonic()
        self._shown = float("-inf")
        self._phase = ""

    def show(self, phase: str, percent: int | None = None) -> None:
        """Say what is being done, and how much of it is."""
        now = time.monotonic()
        if phase == self._phase and now - self._shown < (0.1 if self._live else _QUIET_SECONDS):
            return
        self._phase, self._shown = phase, now
        minutes, seconds = divmod(int(now - self._started), 60)
        text = f"  {minutes}:{seconds:02d}  {phase}" + ("" if percent is None else f" {percent} %")
        print(f"\r{text:<60}" if self._live else text, end="" if self._live else "\n", flush=True)

    def end(self) -> None:
        """Leave the line as it is."""
        if self._live:
            print(flush=True)


def _run(command: Sequence[str], log: Path, on_line: Callable[[str], None]) -> None:
    """Run a command with its output in `log`.

    Raises:
        BuildFailed: it ended with an error, or is not there.
    """
    with log.open("a", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
        except FileNotFoundError:
            raise BuildFailed(f"{command[0]} is not installed") from None
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                on_line(line)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-_TAIL_LINES:])
        raise BuildFailed(f"{' '.join(command[:2])} failed; the end of {log}:\n{tail}")


def _fetch(version: str, folder: Path, log: Path, progress: Progress) -> Path:
    wanted = f"llama-cpp-python=={version}"
    progress.show(f"fetching the source of {wanted}")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-binary", "llama-cpp-python", "--progress-bar", "off", "--dest", str(folder)]
    _run([*pip, wanted], log, lambda _: progress.show(f"fetching the source of {wanted}"))
    found = sorted(folder.glob("*.tar.gz"))
    if not found:
        raise BuildFailed(f"pip brought no source package of {wanted} into {folder}")
    return found[-1]


def _unpack(package: Path, source: Path, progress: Progress) -> None:
    progress.show("unpacking")
    shutil.rmtree(source, ignore_errors=True)
    fresh = source.with_name(f"{source.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(package) as archive:
        archive.extractall(fresh, filter="data")
    # one folder holds all of it; renamed last, so that half of a package is never built
    next(fresh.iterdir()).rename(source)
    fresh.rmdir()


def _compile(source: Path, folder: Path, jobs: int, log: Path, progress: Progress) -> None:
    progress.show("configuring")
    _run(configure_arguments(source, folder), log, lambda _: progress.show("configuring"))

    def tell(line: str) -> None:
        if (percent := percent_done(line)) is not None:
            progress.show("building", percent)

    targets = [word for name in PROGRAMS for word in ("--target", name)]
    _run(["cmake", "--build", str(folder), *targets, "--parallel", str(jobs)], log, tell)


def _version_folder(cache: Path, version: str) -> Path:
    return cache.expanduser() / f"llama-cpp-python-{version}"


def _finished(home: Path, stamp: Stamp) -> bool:
    try:
        made = msgspec.json.decode((home / "stamp.json").read_bytes(), type=Stamp)
    except (FileNotFoundError, msgspec.DecodeError):
        return False
    return made == stamp and all((home / "bin" / name).is_file() for name in PROGRAMS)


def build(cache: Path = CACHE, *, jobs: int = 0) -> Path:
    """Build the programs unless that is done, and return the folder that holds them.

    A build that was interrupted goes on where it was. The sources stay, to be read.

    Raises:
        BuildFailed: pip, tar or CMake could not; nothing is taken for finished then.
    """
    version = pinned_version(CONSTRAINTS.read_text(encoding="utf-8"))
    home, stamp = _version_folder(cache, version), Stamp.wanted(version)
    programs = home / "bin"
    if _finished(home, stamp):
        return programs
    home.mkdir(parents=True, exist_ok=True)
    source, folder, log = home / "source", home / "build", home / "build.log"
    log.write_text("", encoding="utf-8")
    progress = Progress()
    try:
        if not source.is_dir():
            _unpack(_fetch(version, home, log, progress), source, progress)
        _compile(source, folder, jobs or os.cpu_count() or 1, log, progress)
        programs.mkdir(exist_ok=True)
        for name in PROGRAMS:
            shutil.copy2(folder / "bin" / name, programs / name)
        (home / "stamp.json").write_bytes(msgspec.json.encode(stamp))
        shutil.rmtree(folder)
        progress.show("ready")
    finally:
        progress.end()
    return programs


def built(name: str, cache: Path = CACHE) -> Path:
    """Return the path of one of `PROGRAMS`.

    Raises:
        BuildFailed: it is not built.
    """
    home = _version_folder(cache, pinned_version(CONSTRAINTS.read_text(encoding="utf-8")))
    program = home / "bin" / name
    if not program.is_file():
        raise BuildFailed(f"{name} is not built yet: run `make peers` (minutes, once)")
    return program


def built_server(cache: Path = CACHE) -> Path:
    """Return the path of llama-server.

    Raises:
        BuildFailed: it is not built.
    """
    return built("llama-server", cache)


def batched_bench(cache: Path = CACHE) -> Path:
    """Return the path of llama-batched-bench, llama.cpp's own speed without a server.

    Raises:
        BuildFailed: it is not built.
    """
    return built("llama-batched-bench", cache)


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    cache: Path = CACHE,
    jobs: Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=0))] = 0,
) -> None:
    """Build the programs once; afterwards this is instant.

    Args:
        cache: where packages and programs are kept
        jobs: compilers at once; 0 takes one for each core
    """
    try:
        programs = build(cache, jobs=jobs)
    except BuildFailed as error:
        raise SystemExit(f"make peers: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("make peers: stopped; run it again to go on") from None
    for name in PROGRAMS:
        print(programs / name)


if __name__ == "__main__":
    app()
