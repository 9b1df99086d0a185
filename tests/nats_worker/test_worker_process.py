"""`mesh-worker` as a process of its own: flags, signals, exit codes, one clear line."""

import asyncio
import os
import re
import shlex
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import psutil
import pytest

from shared.broker import NatsServer
from shared.protocol import End, Fail

pytestmark = pytest.mark.nats
ENGINE = shlex.join((sys.executable, str(Path(__file__).with_name("fake_engine.py"))))
WAIT = 30.0


def environment(**settings: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MESH_")}
    return kept | {"MESH_ENGINE_COMMAND": ENGINE, "NO_COLOR": "1"} | settings


@pytest.fixture
async def spawn() -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    async with AsyncExitStack() as stack:

        async def start(*arguments: str, **settings: str) -> Process:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "worker.cli",
                *arguments,
                env=environment(**settings),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )

            async def end() -> None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.communicate()

            stack.push_async_callback(end)
            return process

        yield start


async def outcome(process: Process) -> tuple[int, str]:
    async with asyncio.timeout(WAIT):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


@pytest.fixture
def folder(tmp_path: Path, write_gguf) -> Path:
    write_gguf(tmp_path / "models" / "tiny.gguf")
    return tmp_path / "models"


def engine_of(process: Process) -> psutil.Process:
    (engine,) = psutil.Process(process.pid).children()
    return engine


async def test_sigterm_drains_and_exits_cleanly(spawn, router, nats_server: NatsServer, folder):
    process = await spawn(
        "--nats", nats_server.url_for("worker-1"), "--models", str(folder), "--pin-all"
    )
    # The identity is the user in the URL.
    await router.model("worker-1", lambda m: m.state == "ready")
    engine = engine_of(process)
    asked = await router.ask("tokens=4 every=0.1")
    await asked.accepted()
    process.send_signal(signal.SIGTERM)
    assert isinstance(await asked.last(), End)
    code, errors = await outcome(process)
    assert code == 0, errors
    assert "Traceback" not in errors
    assert not engine.is_running()


async def test_a_second_sigterm_ends_at_once(spawn, router, nats_server: NatsServer, folder):
    process = await spawn(
        "--models",
        str(folder),
        "--pin-all",
        "--grace",
        "1000",
        MESH_NATS=nats_server.url_for("worker-1"),
    )
    await router.model("worker-1", lambda m: m.state == "ready")
    asked = await router.ask("hold")
    await asked.accepted()
    process.send_signal(signal.SIGTERM)
    await router.beat("worker-1", lambda b: b.state == "draining")
    process.send_signal(signal.SIGTERM)
    assert isinstance(await asked.last(), Fail)
    code, errors = await outcome(process)
    assert code == 0, errors


async def test_the_engine_dies_with_a_killed_agent(spawn, router, nats_server, folder):
    process = await spawn(
        "--nats", nats_server.url_for("worker-1"), "--models", str(folder), "--pin-all"
    )
    await router.model("worker-1", lambda m: m.state == "ready")
    engine = engine_of(process)
    # Stopped, so that it cannot leave by itself when its link closes.
    engine.suspend()
    process.kill()
    await asyncio.to_thread(engine.wait, WAIT)


async def test_settings_come_from_flags_then_environment_then_file(
    spawn, router, nats_server: NatsServer, folder: Path, tmp_path: Path
):
    config = tmp_path / "mesh.toml"
    config.write_text(
        f'nats = "{nats_server.url_for("worker-2")}"\n'
        "[router]\nport = 1\n"
        f'[worker]\nmodels = "{folder}"\nslots = 3\nqueue = 5\nctx = 128\n'
        "pin-all = true\n"
    )
    await spawn("--config", str(config), "--slots", "7", MESH_QUEUE="6", MESH_SLOTS="9")
    state = await router.model("worker-2", lambda m: m.state == "ready")
    assert (state.slots, state.queue_limit, state.context) == (7, 6, 128)


async def test_a_worker_without_a_usable_model_exits(spawn, nats_server: NatsServer, folder: Path):
    whole = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    process = await spawn(
        "--nats", nats_server.url_for("worker-1"), "--models", str(folder), "--pin-all"
    )
    code, errors = await outcome(process)
    assert code == 1
    last = errors.splitlines()[-1]
    assert re.fullmatch(r"mesh-worker: no model can be served: tiny: tiny.gguf: truncated.*", last)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ((), 2, "Parameter --models requires an argument."),
        (("--models", "{none}"), 2, "models folder {none} is not there"),
        (
            ("--models", "{empty}"),
            2,
            "no model in {empty}: no *.gguf file and no models.toml entry",
        ),
        (
            ("--models", "{folder}", "--model", "nope"),
            2,
            "no model 'nope' in {folder}; there is: tiny",
        ),
        (
            ("--models", "{folder}", "--memory", "lots"),
            2,
            "--memory: 'lots' is no size; wanted for example 2GiB or 512M",
        ),
        (
            ("--models", "{folder}", "--slots", "0"),
            2,
            'Invalid value "0" for --slots. Must be >= 1.',
        ),
        (
            ("--models", "{folder}", "--name", "a b"),
            2,
            "--name: identity 'a b': wanted 1 to 64 letters, digits or '-'",
        ),
        (("--models", "{folder}", "--wrong"), 2, "Unknown option: --wrong."),
        (("--models", "{folder}", "--config", "{none}"), 2, "{none}: No such file or directory"),
        (
            ("--models", "{folder}", "--nats", "nats://127.0.0.1:1"),
            1,
            "NATS at nats://127.0.0.1:1: connection refused",
        ),
        (
            ("--models", "{folder}", "--nats", "http://127.0.0.1:1"),
            1,
            "NATS URL number 1 is wrong; wanted nats://HOST:PORT",
        ),
    ],
)
async def test_what_is_wrong_is_one_line(
    spawn, folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, line: str
):
    names = {"folder": folder, "none": tmp_path / "none", "empty": tmp_path / "empty"}
    names["empty"].mkdir()
    process = await spawn(*(argument.format(**names) for argument in arguments))
    assert await outcome(process) == (code, f"mesh-worker: {line.format(**names)}\n")


async def test_every_setting_is_documented(spawn):
    process = await spawn("--help", MESH_ENGINE_COMMAND="")
    async with asyncio.timeout(WAIT):
        shown, _ = await process.communicate()
    text = shown.decode()
    assert process.returncode == 0
    names = (
        "nats models model pin-all memory slots threads ctx gpu-layers queue grace idle-after name "
        "cache log-level"
    )
    for setting in re.findall(r"\S+", names):
        assert f"--{setting} " in text
        assert f"MESH_{setting.upper().replace('-', '_')}" in text
    assert "MESH_CONFIG" in text
    assert "engine-command" not in text
