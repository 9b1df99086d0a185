"""Precedence of settings, and one line for whatever is wrong."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

import mesh.up
from mesh.cli import main
from mesh.errors import CommandError
from mesh.parts import UpSettings
from mesh.up import check_ports


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[UpSettings]:
    """Settings that `mesh up` would have run with."""
    taken: list[UpSettings] = []

    async def bring_up(settings: UpSettings, narrator: Any) -> None:
        taken.append(settings)

    monkeypatch.setattr(mesh.up, "bring_up", bring_up)
    monkeypatch.setenv("MESH_CONFIG", "")
    monkeypatch.delenv("MESH_CONFIG")
    return taken


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.toml"
    path.write_text(
        'nats = "nats://top:4222"\n'
        '[up]\nport = 1111\nrouters = 2\nworkers = 3\nmodel = ["a", "b"]\n'
        '[worker]\nmemory = "2GiB"\n'
    )
    return path


def test_defaults(asked: list[UpSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert main(["up"]) == 0
    assert asked == [UpSettings(data_dir=Path("/state/mesh"))]


def test_flags_go_before_variables_before_the_file(
    asked: list[UpSettings], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_ROUTERS", "20")
    monkeypatch.setenv("MESH_WORKERS", "30")
    assert main(["up", "--config", str(config), "--workers", "33", "--data-dir", "/d"]) == 0
    (settings,) = asked
    assert (settings.port, settings.routers, settings.workers) == (1111, 20, 33)
    assert settings.models == ("a", "b")
    assert settings.nats == "nats://top:4222"
    assert settings.data_dir == Path("/d")


def test_the_file_may_be_named_by_a_variable(
    asked: list[UpSettings], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_CONFIG", str(config))
    assert main(["up"]) == 0
    assert asked[0].port == 1111


def test_models_may_be_repeated(asked: list[UpSettings]) -> None:
    assert main(["up", "--model", "a.gguf", "--model", "b"]) == 0
    assert asked[0].models == ("a.gguf", "b")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["up", "--prot", "1"], "--prot"),
        (["up", "--port", "x"], "--port"),
        (["up", "--port", "70000"], "--port"),
        (["up", "--workers", "0"], "--workers"),
        (["up", "--load-bound", "1"], "--load-bound"),
        (["up", "--config", "/no/such.toml"], "/no/such.toml"),
        (["status", "--data-dir", "/no/such"], "no mesh runs in /no/such"),
        (["models", "--data-dir", "/no/such"], "no mesh runs in /no/such"),
        (["status", "--nats", "http://h"], "NATS URL"),
        (["status", "--nats", "nats://127.0.0.1:9"], "connection refused"),
        (["fly"], "fly"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) != 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("mesh: ")
    assert reason in told


def test_a_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("[up\n")
    assert main(["up", "--config", str(tmp_path / "bad.toml")]) != 0
    assert capsys.readouterr().err.startswith(f"mesh: {tmp_path / 'bad.toml'}: ")


def test_every_setting_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command, flags in {
        "up": "port routers workers model nats data-dir slots threads ctx speculation config "
        "max-rtt far load-bound",
        "status": "json nats data-dir config",
        "models": "json nats data-dir config",
        "models requantize": "type force config",
        "chat": "url system data-dir config",
        "verify": "model api-key timeout only skip burst streams drain-pid kill-pid json config",
        "nats-config": "routers workers host port store-dir",
        "kubernetes-secrets": "routers workers commands servers release namespace",
    }.items():
        main([*command.split(), "--help"])
        told = capsys.readouterr().out
        for flag in flags.split():
            assert f"--{flag} " in told
            assert f"MESH_{flag.upper().replace('-', '_')}" in told.replace("│\n│", "")


def test_nats_config_has_a_user_for_each_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nats-config", "--routers", "2", "--workers", "1", "--commands", "0"]) == 0
    text = capsys.readouterr().out
    users = [json.loads(line.split(": ")[1]) for line in text.splitlines() if " user: " in line]
    assert users == ["router-1", "router-2", "worker-1", "worker-1-ring"]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=rf"port {port} is taken.*--port"):
            check_ports(port, 1)


def test_port_zero_finds_free_ones() -> None:
    ports = check_ports(0, 3)
    assert len(set(ports)) == 3
    assert min(ports) > 0


def test_ports_beyond_the_last_are_refused() -> None:
    with pytest.raises(CommandError, match="--port 65535"):
        check_ports(65535, 2)
