"""`mesh up`: what it says, what it refuses, what it repairs, and that it leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from mesh_process import MeshUp, clean_environment, mesh_command

from mesh.errors import CommandError
from mesh.models import resolve
from mesh.running import find
from shared.broker import find_binary

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

SMALL = ("--threads", "1", "--slots", "2", "--ctx", "1024")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshUp]:
    """Two routers and two workers."""
    system = MeshUp(tmp_path_factory.mktemp("pair"), "--routers", "2", "--workers", "2", *SMALL)
    try:
        yield system.until_ready()
    finally:
        system.clear_away()


def until(holds: Callable[[], object], within: float = 120.0) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def ask(url: str) -> httpx.Response:
    body = {
        "model": MeshUp.model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 4,
    }
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60)


def answers(url: str) -> bool:
    try:
        return ask(url).status_code == 200
    except httpx.TransportError:
        return False


def test_the_curl_line_answers_when_pasted(pair: MeshUp) -> None:
    lines = pair.text.splitlines()
    assert any("Mesh is ready" in line for line in lines)
    assert any(line.split() == ["base", "URL", pair.base_url] for line in lines)
    (line,) = [line for line in lines if line.startswith("curl ")]
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert "network" in answer["choices"][0]["message"]["content"]


def test_every_router_serves(pair: MeshUp) -> None:
    urls = [line.split()[-1] for line in pair.text.splitlines() if "base URL" in line]
    assert len(urls) == 2
    assert [ask(url).status_code for url in urls] == [200, 200]


def test_secrets_are_on_no_command_line_and_in_no_readable_file(pair: MeshUp) -> None:
    secret = pair.running.nats.split("@")[0].rpartition(":")[2]
    assert len(secret) >= 32
    for child in [psutil.Process(pair.process.pid), *pair.children()]:
        line = " ".join(child.cmdline())
        assert secret not in line
        assert "nats://" not in line
    for path in pair.data_dir.rglob("*"):
        if path.is_file() and secret in path.read_text(errors="replace"):
            assert path.stat().st_mode & 0o077 == 0, path
    assert pair.data_dir.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("part", ["worker-1", "engine of worker-2", "router-1", "nats"])
def test_a_part_that_is_killed_comes_back(pair: MeshUp, part: str) -> None:
    before = pair.pids[part]
    os.kill(before, signal.SIGKILL)
    until(lambda: pair.pids.get(part, before) != before)
    until(lambda: answers(pair.base_url))
    if not part.startswith("engine"):
        until(lambda: "starting it again" in pair.text)


def test_ctrl_c_stops_everything(pair: MeshUp) -> None:
    until(lambda: len(pair.pids) == 8)
    assert pair.end(signal.SIGINT) == 0, pair.story()
    assert pair.left() == []
    assert pair.errors.read_text() == ""
    with pytest.raises(CommandError, match="no mesh runs"):
        find(pair.data_dir)


def test_sigterm_lets_answers_end(folder: Path) -> None:
    system = MeshUp(folder, *SMALL)
    try:
        system.until_ready()
        body = {
            "model": system.model,
            "messages": [{"role": "user", "content": "Tell a story."}],
            "stream": True,
            "max_tokens": 200,
            "ignore_eos": True,
        }
        url = f"{system.base_url}/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            system.children()
            system.process.terminate()
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert system.end() == 0
        assert system.left() == []
    finally:
        system.clear_away()


def test_a_second_signal_does_not_wait(folder: Path) -> None:
    system = MeshUp(folder, *SMALL)
    try:
        system.until_ready()
        # A router that cannot react would otherwise be waited for.
        os.kill(system.pids["router-1"], signal.SIGSTOP)
        system.process.terminate()
        until(lambda: "stopping" in system.text)
        began = time.monotonic()
        assert system.end() == 0
        assert time.monotonic() - began < 30
        assert system.left() == []
    finally:
        system.clear_away()


def test_nothing_outlives_a_killed_mesh_up(folder: Path) -> None:
    system = MeshUp(folder, *SMALL)
    try:
        system.until_ready()
        assert len(system.pids) == 5
        assert system.end(signal.SIGKILL) == -signal.SIGKILL
        assert system.left() == []
        with pytest.raises(CommandError, match="ended without cleaning up"):
            find(system.data_dir)
    finally:
        system.clear_away()


def test_a_signal_during_the_start_stops_everything_too(folder: Path) -> None:
    system = MeshUp(folder, *SMALL)
    try:
        until(lambda: len(system.pids) >= 4)
        assert system.end(signal.SIGINT) == 0, system.story()
        assert system.left() == []
    finally:
        system.clear_away()


def test_a_nats_server_that_runs_already_is_used(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [find_binary(), "-a", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    system = None
    try:
        until(lambda: not _free(port))
        system = MeshUp(folder, "--nats", f"nats://127.0.0.1:{port}", *SMALL).until_ready()
        assert "nats" not in system.pids
        assert answers(system.base_url)
        assert system.end() == 0
        assert system.left() == []
        assert server.poll() is None
    finally:
        if system is not None:
            system.clear_away()
        server.kill()
        server.wait()


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def refused(folder: Path, *arguments: str) -> str:
    """Run a `mesh up` that must fail at once, and return the one line it says."""
    command = mesh_command("up", "--data-dir", str(folder / "data"), *arguments)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    ) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.startswith("mesh: ")
    assert errors.count("\n") == 1, errors
    ours = [p for p in psutil.process_iter() if str(folder) in " ".join(_words(p))]
    assert ours == []
    return errors


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_port_that_is_taken_is_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} is taken" in refused(folder, "--port", port)


def test_a_file_that_is_missing_is_one_line(folder: Path) -> None:
    assert "does not exist" in refused(folder, "--port", "0", "--model", str(folder / "no.gguf"))


def test_a_file_that_is_no_gguf_is_one_line(folder: Path) -> None:
    path = folder / "text.gguf"
    path.write_text("hello, I am a model")
    assert "is not a GGUF file" in refused(folder, "--port", "0", "--model", str(path))


def test_a_file_that_is_cut_short_is_one_line(folder: Path) -> None:
    (real,) = resolve((), folder)
    path = folder / "cut.gguf"
    with open(real.file, "rb") as source, path.open("wb") as target:
        target.write(source.read(8 * 1024 * 1024))
    told = refused(folder, "--port", "0", "--model", str(path), *SMALL)
    assert "cut" in told


def test_a_nats_server_that_is_not_there_is_one_line(folder: Path) -> None:
    told = refused(folder, "--port", "0", "--nats", "nats://127.0.0.1:9")
    assert "nats://127.0.0.1:9: connection refused" in told


def test_a_wrong_nats_url_is_one_line(folder: Path) -> None:
    assert "NATS URL" in refused(folder, "--port", "0", "--nats", "http://127.0.0.1")


def test_a_nats_server_that_refuses_us_is_one_line(folder: Path, mesh_system: MeshUp) -> None:
    address = mesh_system.running.nats.partition("@")[2]
    told = refused(folder, "--port", "0", "--nats", f"nats://mesh-1:wrong@{address}")
    assert "refused" in told
    assert "wrong" not in told


def test_two_in_one_folder_are_refused(mesh_system: MeshUp) -> None:
    command = mesh_command("up", "--port", "0", "--data-dir", str(mesh_system.data_dir))
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), timeout=60, check=False
    )
    assert done.returncode != 0
    assert "a mesh runs already" in done.stderr
    assert mesh_system.running.pid == mesh_system.process.pid


def test_one_bad_model_does_not_keep_the_others_from_serving(folder: Path) -> None:
    (real,) = resolve((), folder)
    cut = folder / "cut.gguf"
    with open(real.file, "rb") as source, cut.open("wb") as target:
        target.write(source.read(8 * 1024 * 1024))
    good = folder / "good.gguf"
    shutil.copy(real.file, good)
    system = MeshUp(folder, "--model", str(cut), "--model", str(good), *SMALL)
    try:
        system.until_ready()
        assert "worker-1 cannot serve cut: " in system.text
        assert system.running.models == ("good",)
        assert system.end() == 0
        assert system.left() == []
    finally:
        system.clear_away()
