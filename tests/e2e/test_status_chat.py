"""`mesh status`, `mesh models` and `mesh chat` on a running system."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from mesh_process import MeshUp, clean_environment, mesh_command

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]


def mesh(system: MeshUp, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        mesh_command(*arguments, "--data-dir", str(system.data_dir)),
        input=stdin,
        capture_output=True,
        text=True,
        env=clean_environment() | {"COLUMNS": "200"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_status_shows_routers_workers_and_models(mesh_system: MeshUp) -> None:
    text = mesh(mesh_system, "status")
    for words in ("router-1", "worker-1", mesh_system.model, "ready", "0/"):
        assert words in text


def test_status_as_json_holds_all_of_it(mesh_system: MeshUp) -> None:
    status: dict[str, Any] = json.loads(mesh(mesh_system, "status", "--json"))
    (worker,) = status["workers"]
    (router,) = status["routers"]
    (model,) = status["models"]
    assert worker["worker"] == "worker-1"
    assert worker["models"][0]["queued"] == 0
    assert f"{router['url'].removesuffix('/v1')}/v1" == mesh_system.base_url
    assert (model["name"], model["state"]) == (mesh_system.model, "ready")
    assert model["context"] > 0


def test_status_by_url_is_the_same(mesh_system: MeshUp) -> None:
    text = mesh(mesh_system, "status", "--json", "--nats", mesh_system.running.nats)
    assert [worker["worker"] for worker in json.loads(text)["workers"]] == ["worker-1"]


def test_models_lists_each_with_its_workers(mesh_system: MeshUp) -> None:
    text = mesh(mesh_system, "models")
    assert mesh_system.model in text
    assert "worker-1" in text
    (model,) = json.loads(mesh(mesh_system, "models", "--json"))
    assert [worker["worker"] for worker in model["workers"]] == ["worker-1"]


def test_replicas_are_set_shown_and_cleared(mesh_system: MeshUp) -> None:
    name = mesh_system.model
    usual = f"{name}: at least 0, at most as many as demand asks for, priority 0"
    assert mesh(mesh_system, "models", "set", name).startswith(usual)
    said = mesh(mesh_system, "models", "set", name, "--min", "1", "--max", "3", "--pin", "worker-1")
    assert said == f"{name}: at least 1, at most 3, priority 0, pinned to worker-1\n"
    said = mesh(mesh_system, "models", "set", name, "--priority", "2", "--unpin")
    assert said == f"{name}: at least 1, at most 3, priority 2, pinned to no worker\n"
    assert "at least 1, at most 3" in mesh(mesh_system, "models", "set", name)
    assert mesh(mesh_system, "models", "set", name, "--clear").startswith(usual)
    said = mesh(mesh_system, "models", "set", "org/other:7b", "--max", "1")
    assert "no worker tells of a model 'org/other:7b' yet" in said
    mesh(mesh_system, "models", "set", "org/other:7b", "--clear")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--min", "3", "--max", "2"), "--min 3 is more than --max 2; wanted at most as many"),
        (("--clear", "--min", "1"), "--clear: wanted without other settings"),
        (("--pin", "a", "--unpin"), "--pin and --unpin: wanted one of them"),
        (("--min", "-1"), 'Invalid value "-1" for --min. Must be >= 0.'),
    ],
)
def test_what_cannot_be_set_is_one_line(
    mesh_system: MeshUp, flags: tuple[str, ...], line: str
) -> None:
    done = subprocess.run(
        mesh_command(
            *("models", "set", mesh_system.model, *flags),
            *("--data-dir", str(mesh_system.data_dir)),
        ),
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, f"mesh: {line}\n")


def test_chat_answers_what_is_piped_in(mesh_system: MeshUp) -> None:
    answer = mesh(mesh_system, "chat", "--temperature", "0", stdin="What is a mesh network?\n")
    assert "network" in answer
    brief = ("--system", "Be brief.", "--max-tokens", "16")
    named = mesh(mesh_system, "chat", mesh_system.model, *brief, stdin="Hello!")
    assert named.strip()


def test_chat_with_an_unknown_model_is_one_line(mesh_system: MeshUp) -> None:
    done = subprocess.run(
        mesh_command("chat", "gpt-9", "--url", mesh_system.base_url),
        input="hi",
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "gpt-9" in done.stderr
    assert mesh_system.model in done.stderr
    assert done.stderr.count("\n") == 1


class Terminal:
    """A pseudo terminal with a command of `mesh` in it."""

    def __init__(self, *arguments: str, term: str = "dumb") -> None:
        self.text = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            # A shell's background job ignores SIGINT, and so would what it starts.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            command = mesh_command(*arguments)
            size = {"COLUMNS": "200", "LINES": "60"}
            os.execve(command[0], command, clean_environment() | size | {"TERM": term})

    def until(self, holds: Callable[[str], object]) -> None:
        """Read until the text so far is as wanted."""
        deadline = time.monotonic() + 120
        while not holds(self.text):
            assert time.monotonic() < deadline, self.text
            self._read()

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Read to the end and return the exit code."""
        deadline = time.monotonic() + 60
        while self._read():
            assert time.monotonic() < deadline, self.text
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def clear_away(self) -> None:
        os.close(self._fd)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _read(self) -> bool:
        if select.select([self._fd], [], [], 0.1)[0]:
            try:
                self.text += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:
                # How Linux says that the other end of a terminal is closed.
                return False
        return True


def test_ctrl_c_stops_the_answer_and_then_the_chat(mesh_system: MeshUp) -> None:
    terminal = Terminal("chat", "--url", mesh_system.base_url, "--max-tokens", "300")
    question = "Write a very long story about the sea, of many chapters."
    try:
        terminal.until(lambda text: text.endswith("> "))
        terminal.type(f"{question}\r")
        terminal.until(lambda text: len(text.partition(question)[2]) > 40)
        terminal.type("\x03")
        terminal.until(lambda text: text.endswith("> ") and "…" in text)
        terminal.type("Say yes.\r")
        terminal.until(lambda text: text.partition("Say yes.")[2].endswith("> "))
        terminal.type("\x03")
        assert terminal.end() == 0
    finally:
        terminal.clear_away()


def test_top_shows_it_all_until_ctrl_c(mesh_system: MeshUp) -> None:
    terminal = Terminal("top", "--data-dir", str(mesh_system.data_dir), term="xterm")
    try:
        # The demand is that of the questions above; pinned models have a lease like others.
        wanted = ("router-1", "worker-1", mesh_system.model, "demand", "held by")
        terminal.until(lambda text: all(word in text for word in wanted))
        terminal.type("\x03")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text
    finally:
        terminal.clear_away()


def test_top_without_a_terminal_is_one_line(mesh_system: MeshUp) -> None:
    done = subprocess.run(
        mesh_command("top", "--data-dir", str(mesh_system.data_dir)),
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ("mesh: mesh top needs a terminal; mesh status prints the state once\n")
