import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import router.cli
from mesh.errors import CommandError
from mesh.parts import (
    UpSettings,
    child_environment,
    identities,
    router_command,
    threads_for,
    worker_command,
)
from router.settings import Settings
from shared.broker import render_users

SECRET = "nats://worker-1:secret@127.0.0.1:4222"


@given(st.integers(1, 64), st.integers(1, 512))
def test_a_core_is_left_to_the_rest_where_there_are_enough(workers: int, cores: int) -> None:
    threads = threads_for(workers, cores)
    assert threads >= 1
    assert threads * workers <= max(workers, cores - 1)


def test_every_process_has_an_identity_and_a_password_of_its_own() -> None:
    users = identities(2, 3, 2)
    assert [user.name for user in users] == [
        *("router-1", "router-2", "worker-1", "worker-2", "worker-3", "mesh-1", "mesh-2"),
    ]
    passwords = {user.password for user in users} | {user.password for user in identities(2, 3, 2)}
    assert len(passwords) == 14
    assert min(map(len, passwords)) >= 32
    assert "worker-3" in render_users(users)


def test_children_get_the_secret_by_environment_and_none_of_our_own_settings() -> None:
    ours = {"MESH_PORT": "1", "MESH_MODEL": "x", "MESH_THREADS": "9", "MESH_CTX": "1"}
    kept = {"PATH": "/bin", "MESH_MEMORY": "2GiB", "MESH_CONFIG": "/c.toml"}
    assert child_environment(SECRET, ours | kept) == kept | {"MESH_NATS": SECRET}


def test_command_lines_say_what_was_asked_for() -> None:
    settings = UpSettings(data_dir=Path("/d"), workers=2, slots=4, context=512, speculation="off")
    worker = worker_command("worker-1", Path("/d/served"), settings, cores=9)
    assert os.path.basename(worker[0]) == "mesh-worker"
    assert worker[1:] == [
        *("--name", "worker-1", "--models", "/d/served", "--pin-all", "--threads", "4"),
        *("--slots", "4", "--ctx", "512", "--speculation", "off"),
    ]
    command = router_command("router-1", 9337, settings)
    assert os.path.basename(command[0]) == "mesh-router"
    assert command[1:] == ["--name", "router-1", "--port", "9337"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"max_rtt": 12.5}, Settings(name="r", max_rtt=0.0125)),
        ({"far": True}, Settings(name="r", far=True)),
        ({"far": False}, Settings(name="r", far=False)),
        ({"load_bound": 3.25}, Settings(name="r", load_bound=3.25)),
    ],
)
def test_routers_take_what_they_are_told(
    asked: dict[str, Any], told: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Settings] = []
    monkeypatch.setattr(router.cli, "run", lambda settings: ran.append(settings) or 0)
    # A flag goes before what the environment says.
    monkeypatch.setenv("MESH_FAR", "true" if asked.get("far") is False else "false")

    command = router_command("r", 9337, UpSettings(data_dir=Path("/d"), **asked))
    assert router.cli.main(command[1:]) == 0

    assert ran == [told]


def test_threads_asked_for_are_threads_given() -> None:
    settings = UpSettings(data_dir=Path("/d"), threads=7)
    assert worker_command("worker-1", Path("/m"), settings, cores=2)[-2:] == ["--threads", "7"]


def test_a_part_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CommandError, match=r"mesh-router is not installed.*\[router\]"):
        router_command("router-1", 1, UpSettings(data_dir=Path("/d")))
