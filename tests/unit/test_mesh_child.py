import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mesh.child import Child
from mesh.crew import Crew, how_it_ended
from mesh.errors import CommandError

SLEEP = ("sleep", "600")


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", text)


def child(tmp_path: Path, command: tuple[str, ...], name: str = "part") -> Child:
    return Child(name, command, dict(os.environ), tmp_path / f"{name}.log")


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_output_goes_to_the_log_and_the_last_line_is_told(tmp_path: Path) -> None:
    part = child(tmp_path, script("import sys; print('one'); sys.exit('two\\n')"))
    await part.start()
    assert await part.wait() == 1
    assert part.pid is None
    assert set(part.log_path.read_text().split()) == {"one", "two"}
    assert part.last_words() in {"one", "two"}


async def test_a_child_that_does_not_end_is_killed_with_its_own_children(tmp_path: Path) -> None:
    stubborn = (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    part = child(tmp_path, script(stubborn))
    await part.start()
    await until(part.last_words)
    await part.stop(grace=0.1)
    assert await part.wait() == -signal.SIGKILL
    grandchild = int(part.last_words())
    await until(lambda: gone(grandchild))


async def test_stopping_what_never_started_or_has_ended_is_nothing(tmp_path: Path) -> None:
    part = child(tmp_path, script(""))
    await part.stop(1.0)
    await part.start()
    assert await part.wait() == 0
    await part.stop(1.0)
    part.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent")
async def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from mesh.child import Child\n"
        "async def main():\n"
        "    part = Child('part', ('sleep', '600'), dict(os.environ), Path(sys.argv[1]))\n"
        "    await part.start()\n"
        "    print(part.pid, flush=True)\n"
        "    await part.wait()\n"
        "asyncio.run(main())\n"
    )
    log = str(tmp_path / "log")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", parent, log), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    assert not gone(pid)
    process.kill()
    await process.wait()
    await until(lambda: gone(pid))


async def test_a_death_during_the_start_fails_the_start(tmp_path: Path) -> None:
    crew = Crew(pytest.fail)
    part = child(tmp_path, script("import sys; sys.exit('port 1 is taken')"), "router-1")
    async with asyncio.TaskGroup() as group:
        group.create_task(crew.keep("routers", part))
        with pytest.raises(CommandError, match=r"router-1 ended \(exit code 1\): port 1 is taken"):
            await crew.unless_failed(asyncio.sleep(600))


async def test_what_cannot_be_started_fails_the_start(tmp_path: Path) -> None:
    crew = Crew(pytest.fail)
    part = Child("router-1", SLEEP, {}, tmp_path / "no" / "folder")
    async with asyncio.TaskGroup() as group:
        group.create_task(crew.keep("routers", part))
        with pytest.raises(CommandError, match="cannot start router-1"):
            await crew.unless_failed(asyncio.sleep(600))


async def test_work_of_the_start_gives_its_result_and_its_errors() -> None:
    crew = Crew(pytest.fail)

    async def broken() -> None:
        raise CommandError("no")

    assert await crew.unless_failed(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(CommandError, match="no"):
        await crew.unless_failed(broken())


async def test_a_later_death_is_reported_and_repaired_until_the_stop(tmp_path: Path) -> None:
    told: list[str] = []
    crew = Crew(told.append)
    part = child(tmp_path, SLEEP, "worker-1")
    async with asyncio.TaskGroup() as group:
        group.create_task(crew.keep("workers", part))
        await until(lambda: part.pid)
        first = crew.pids["worker-1"]
        crew.settle()
        os.kill(first, signal.SIGKILL)
        await until(lambda: part.pid not in (None, first))
        second = crew.pids["worker-1"]
        assert told == ["worker-1 ended (killed by SIGKILL); starting it again in 0.5 s"]
        await crew.stop("workers", grace=20)
    assert gone(second)
    assert crew.pids == {}
    assert len(told) == 1


async def test_a_stop_ends_the_wait_for_a_restart(tmp_path: Path) -> None:
    told = asyncio.Event()
    crew = Crew(lambda _: told.set())
    crew.settle()
    part = child(tmp_path, script(""), "worker-1")
    async with asyncio.TaskGroup() as group:
        group.create_task(crew.keep("workers", part))
        await told.wait()
        await crew.stop("workers", grace=1)
    assert part.pid is None


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-99, "by signal 99")],
)
def test_exit_codes_are_put_into_words(code: int, words: str) -> None:
    assert words in how_it_ended(code)
