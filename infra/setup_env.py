"""Makes the virtual environment that every other target of the Makefile uses.

Runs before anything is installed, so with the standard library only. The Makefile has made sure
that the Python that runs this is new enough.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO

EXTRAS = "router,worker,demo,dev"
STAMP = ".mesh-env"
ENGINE_STAMP = ".mesh-engine"
LOG = "setup.log"
ENGINE = "llama-cpp-python"
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""GCC before 11.5, 12.4, 13.3 and 14 drops all but the first bytes of the tile configuration that
llama.cpp loads (GCC bug 114098), and the first matrix product ends in SIGILL. With other compilers
too, one row would be computed by AVX-512 and several by AMX, and rounded otherwise."""
WITHOUT_FP16 = "-mno-avx512fp16"
"""With it llama.cpp takes vectors of 16 bits by 128 numbers, and what is left over one by one: all
of a head of 64, so that a token behind 1,500 others took 45 ms instead of 16 (SmolLM2 Q4_0, Xeon).
Sums are of 32 bits without it."""
STEP = re.compile(r"\[\s*(\d+)/(\d+)\]")
PERCENT = re.compile(r"\[\s*(\d{1,3})%\]")
PHASES = (
    ("Collecting ", "finding"),
    ("Downloading ", "fetching"),
    ("Building wheel for ", "building"),
    ("Building editable for ", "building"),
    ("Installing collected packages", "installing packages"),
)


class SetupError(Exception):
    """Something is missing or failed; the message is all that the user needs."""


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.width = shutil.get_terminal_size().columns - 1
        self.shown = float("-inf")
        self.phase = ""

    def show(self, text: str) -> None:
        """Say what is going on, unless something of the kind was said a moment ago."""
        now = time.monotonic()
        phase = text.split("[")[0]
        pause = 0.1 if self.live else 15.0
        if now - self.shown < pause and (phase == self.phase or not phase.startswith("build")):
            return
        self.shown, self.phase = now, phase
        self._write(text)

    def end(self, text: str) -> None:
        """Say the last word of this progress."""
        self._write(text)
        if self.live:
            sys.stdout.write("\n")

    def _write(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        line = f"  {minutes}:{seconds:02d}  {text}"
        if self.live:
            sys.stdout.write("\r" + line[: self.width].ljust(self.width))
        else:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()


class BuildReader:
    """Turns pip's verbose output into a few words on what it does."""

    def __init__(self) -> None:
        self.doing = ""

    def read(self, line: str) -> str:
        """Return what a line of output tells of the state of affairs, or the empty string."""
        line = line.strip()
        for start, verb in PHASES:
            if line.startswith(start):
                rest = line[len(start) :].split()
                name = rest[0].rsplit("/", 1)[-1] if rest and start.endswith(" ") else ""
                self.doing = f"{verb} {name}".strip()
                return self.doing
        if not self.doing.startswith("building"):
            return ""
        if step := STEP.search(line):
            return f"{self.doing} [{step[1]}/{step[2]}]"
        if percent := PERCENT.search(line):
            return f"{self.doing} [{percent[1]}%]"
        return ""


def check_tools() -> None:
    """Say what is missing before anything is made.

    Raises:
        SetupError: there is no compiler, no CMake or no venv module.
    """
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise SetupError(
            f"no C++ compiler found (looked for {', '.join(names)}); llama.cpp is built from "
            "source. Install one, e.g. `apt-get install g++`, or set CXX"
        )
    if not shutil.which("cmake"):
        raise SetupError(
            "cmake not found; llama.cpp is built from source. Install it, "
            "e.g. `apt-get install cmake`"
        )
    probe = subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True)
    if probe.returncode != 0:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments. Install its venv package, "
            "e.g. `apt-get install python3-venv`"
        )


def build_arguments() -> str:
    """For CMake: this CPU's instructions but two; then the user's `CMAKE_ARGS`, which win."""
    arguments = ["-DGGML_NATIVE=ON"]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    flags: list[str] = []
    for without in (WITHOUT_AMX, WITHOUT_FP16):
        probe = [*compiler, *without.split(), "-x", "c++", "-E", os.devnull]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            flags.append(without)
    if flags:
        given = " ".join(flags)
        arguments += [f"-DCMAKE_{language}_FLAGS={given}" for language in ("C", "CXX")]
    return f"{shlex.join(arguments)} {os.environ.get('CMAKE_ARGS', '')}".strip()


def built_for(arguments: str) -> str:
    """What a build depends on that its wheel's name does not tell: flags, compiler and CPU."""
    digest = hashlib.sha256(f"{arguments} {platform.machine()}".encode())
    for variable in ("CC", "CXX", "CFLAGS", "CXXFLAGS"):
        digest.update(f"{variable}={os.environ.get(variable, '')}".encode())
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    digest.update(subprocess.run([*compiler, "--version"], capture_output=True).stdout)
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^(?:flags|Features)\s*:.*$", cpu, re.MULTILINE)
        digest.update(found.group().encode() if found else b"")
    return digest.hexdigest()[:16]


def build_cache(python: Path, build: str) -> dict[str, str]:
    """Variables that keep one CPU's build from being another's: pip knows wheels by their name."""
    asked = [str(python), "-m", "pip", "cache", "dir"]
    told = subprocess.run(asked, capture_output=True, encoding="utf-8")
    folder = told.stdout.strip()
    return {"PIP_CACHE_DIR": f"{folder}/mesh-{build}"} if told.returncode == 0 and folder else {}


def fingerprint(root: Path, cmake_args: str) -> str:
    """What the environment is made from; another fingerprint means: install again."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "infra/setup_env.py"):
        digest.update((root / name).read_bytes())
    for part in (str(root), sys.version, EXTRAS, cmake_args):
        digest.update(part.encode())
    return digest.hexdigest()


def run_pip(
    command: list[str], environment: dict[str, str], log: IO[str], progress: Progress
) -> None:
    """Run pip, its output into the log and as progress onto the terminal.

    Raises:
        SetupError: pip failed; holds the end of its output.
    """
    reader, tail = BuildReader(), deque[str](maxlen=30)
    progress.show("starting pip")
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as pip:
        if pip.stdout is None:
            raise SetupError("pip has no output to read")
        for line in pip.stdout:
            log.write(line)
            tail.append(line)
            if told := reader.read(line):
                progress.show(told)
    if pip.returncode != 0:
        progress.end("failed")
        raise SetupError(f"pip failed; the end of {log.name}:\n\n{''.join(tail)}")


def make(root: Path, venv: Path) -> None:
    """Make or bring up to date the environment; instant if nothing has changed.

    Raises:
        SetupError: something is missing, or a step failed.
    """
    mark = fingerprint(root, os.environ.get("CMAKE_ARGS", ""))
    stamp = venv / STAMP
    if stamp.exists() and stamp.read_text(encoding="ascii").strip() == mark:
        return
    check_tools()
    sys.stdout.write(f"Making the environment {venv}: llama.cpp is built, which takes minutes.\n")
    python = venv / "bin" / "python"
    if not python.exists():
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)])
        if made.returncode != 0:
            raise SetupError(f"could not make the virtual environment {venv}")
    arguments = build_arguments()
    environment = os.environ | {"CMAKE_ARGS": arguments, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    pip = [str(python), "-m", "pip", "install", "--verbose", "--disable-pip-version-check"]
    pip += ["-c", str(root / "constraints.txt")]
    progress = Progress()
    with (venv / LOG).open("w", encoding="utf-8") as log:
        engine, build = venv / ENGINE_STAMP, built_for(arguments)
        if not engine.exists() or engine.read_text(encoding="ascii").strip() != build:
            cached = environment | build_cache(python, build)
            # Whatever is there was built for something else.
            run_pip([*pip, "--force-reinstall", "--no-deps", ENGINE], cached, log, progress)
            engine.write_text(build + "\n", encoding="ascii")
        run_pip([*pip, "-e", f"{root}[{EXTRAS}]"], environment, log, progress)
    progress.end("environment ready")
    stamp.write_text(mark + "\n", encoding="ascii")


def main() -> int:
    """Parse the command line; every expected failure is one message and exit code 1."""
    parser = argparse.ArgumentParser(description="Make the project's virtual environment.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where to make it")
    venv: Path = parser.parse_args().venv
    try:
        make(Path(__file__).resolve().parent.parent, venv)
    except SetupError as error:
        sys.stderr.write(f"make env: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nmake env: stopped; run it again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
