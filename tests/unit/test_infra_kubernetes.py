"""The manifests in infra/kubernetes: by the schemas, and by what no schema knows of the mesh."""

import base64
import contextlib
import io
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cyclopts import App
from cyclopts.config import Env
from litestar.handlers import HTTPRouteHandler

import router.cli
import worker.cli
from mesh.cli import main as mesh
from router.dispatch import Dispatcher
from router.health import health_routes
from router.metrics import Metrics
from shared.command_line import identity, settings_from_file
from shared.sizes import parse_size
from worker.cache_folder import cache_folder

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
VERSIONS = ("1.31", "1.37")
"""`ordinals` is stable from 1.31 on; the other is the newest whose schemas we have."""
APPS: dict[str, App] = {"router": router.cli.app, "worker": worker.cli.app}
QUANTITIES = {"Gi": "GiB", "Mi": "MiB"}


def documents() -> list[dict[str, Any]]:
    return [
        document
        for path in sorted(FOLDER.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text("utf-8"))
    ]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = (d for d in documents() if (d["kind"], d["metadata"]["name"]) == (kind, name))
    return found


def pod(part: str) -> dict[str, Any]:
    return one("StatefulSet", part)["spec"]["template"]["spec"]


def container(part: str) -> dict[str, Any]:
    (only,) = pod(part)["containers"]
    return only


def settings(part: str) -> dict[str, Any]:
    """What the real command line makes of the container's arguments."""
    command = container(part)
    assert command["command"] == [f"mesh-{part}"]
    app = APPS[part]
    # As the program has it: variables, and no file yet.
    app.config = (Env("MESH_"),)
    _, bound, unknown = app.parse_args(command["args"], exit_on_error=False, print_error=False)[:3]
    assert not unknown
    bound.apply_defaults()
    return dict(bound.arguments)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("MESH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def made() -> dict[str, dict[str, str]]:
    """The files in the Secrets that `mesh kubernetes-secrets` prints."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert mesh(["kubernetes-secrets"]) == 0
    listed = json.loads(told.getvalue())
    assert (listed["apiVersion"], listed["kind"]) == ("v1", "List")
    for secret in listed["items"]:
        kubernetes_validate.validate(secret, VERSIONS[-1], strict=True)
    return {
        secret["metadata"]["name"]: {
            key: base64.b64decode(data).decode() for key, data in secret["data"].items()
        }
        for secret in listed["items"]
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(version: str) -> None:
    kinds = set()
    for document in documents():
        if document["kind"] != "ScaledObject":
            assert kubernetes_validate.validate(document, version, strict=True) == version
            kinds.add(document["kind"])
    assert {"Service", "StatefulSet", "NetworkPolicy", "PersistentVolumeClaim"} <= kinds


def test_the_schema_knows_a_mistake() -> None:
    wrong = one("StatefulSet", "worker")
    wrong["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_keda_takes_the_scaled_object() -> None:
    document = one("ScaledObject", "worker")
    read = ScaledObject.model_validate(document)
    # The models leave out what they do not know, so that a misspelt field would be missing.
    assert json.loads(read.model_dump_json(by_alias=True, exclude_unset=True)) == document


@pytest.mark.parametrize("part", APPS)
def test_the_programs_take_their_arguments_and_variables(part: str) -> None:
    names = {f"MESH_{name.upper()}" for name in settings(part)} | {"MESH_CONFIG"}
    if part == "worker":
        names.add("MESH_CACHE_DIR")
    variables = {entry["name"]: entry.get("value", "") for entry in container(part)["env"]}
    assert {name for name in variables if name.startswith("MESH_")} <= names
    # Each place that a setting names is a volume, or the root, which is read-only.
    mounts = {mount["mountPath"]: mount for mount in container(part)["volumeMounts"]}
    assert variables["MESH_CONFIG"] in mounts
    volumes = {volume["name"] for volume in pod(part)["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes


def test_a_worker_keeps_what_it_measured_where_it_may_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for entry in container("worker")["env"]:
        if "value" in entry:
            monkeypatch.setenv(entry["name"], entry["value"])
    mounts = {m["mountPath"]: m for m in container("worker")["volumeMounts"]}
    (held,) = (mount for path, mount in mounts.items() if cache_folder().is_relative_to(path))
    assert not held.get("readOnly")
    assert mounts[str(settings("worker")["models"])]["readOnly"]


@pytest.mark.parametrize("part", APPS)
def test_each_pod_has_a_user_of_its_own(
    part: str, made: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    spec = one("StatefulSet", part)["spec"]
    count = (
        spec["replicas"]
        if part == "router"
        else one("ScaledObject", "worker")["spec"]["maxReplicaCount"]
    )
    first = spec["ordinals"]["start"]
    pods = [f"{part}-{number}" for number in range(first, first + count)]
    (volume,) = (v for v in pod(part)["volumes"] if v["name"] == "identities")
    (mount,) = (m for m in container(part)["volumeMounts"] if m["name"] == "identities")
    assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in (
        container(part)["env"]
    )
    held = made[volume["secret"]["secretName"]]
    assert len(held) >= count
    urls = set()
    for name in pods:
        text = held[mount["subPathExpr"].replace("$(POD_NAME)", name)]
        path = tmp_path / "mesh.toml"
        path.write_text(text, "utf-8")
        # As the program reads it: the file must have a place for nothing that it does not know.
        assert settings_from_file(path, part)
        url = tomllib.loads(text)["nats"]
        assert identity(part, url) == name
        urls.add(url)
    assert len(urls) == count


@pytest.mark.parametrize("part", APPS)
def test_there_is_time_to_drain(part: str) -> None:
    spec = pod(part)
    before = container(part).get("lifecycle", {}).get("preStop", {}).get("sleep", {})
    needed = before.get("seconds", 0) + settings(part)["grace"]
    assert spec["terminationGracePeriodSeconds"] >= needed + 10


@pytest.mark.parametrize("part", APPS)
def test_nothing_is_read_as_a_setting_by_accident(part: str) -> None:
    """A service called mesh would make MESH_PORT=tcp://… in every pod."""
    assert pod(part)["enableServiceLinks"] is False


def test_ports_and_probes_are_the_routers() -> None:
    command = container("router")
    asked = settings("router")
    assert asked["host"] == "0.0.0.0"
    (port,) = command["ports"]
    assert port["containerPort"] == asked["port"]
    (service,) = one("Service", "router")["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    url = urlsplit(one("ScaledObject", "worker")["spec"]["triggers"][0]["metadata"]["url"])
    assert url.port == service["port"]
    assert str(url.hostname).split(".")[0] == one("Service", "router")["metadata"]["name"]
    assert url.path in paths()
    for probe in ("readinessProbe", "livenessProbe"):
        assert command[probe]["httpGet"]["port"] == port["name"]
        assert command[probe]["httpGet"]["path"] in paths()
    marks = one("StatefulSet", "router")["spec"]["template"]["metadata"]["annotations"]
    assert marks["prometheus.io/path"] in paths()
    assert marks["prometheus.io/port"] == str(port["containerPort"])


def paths() -> set[str]:
    """What a router answers beside requests."""
    routes: list[HTTPRouteHandler] = health_routes(
        object.__new__(Dispatcher), Metrics(lambda _: True, lambda: True)
    )
    return {path for route in routes for path in route.paths}


def test_the_trigger_names_a_metric_without_labels() -> None:
    trigger = one("ScaledObject", "worker")["spec"]["triggers"][0]
    assert (trigger["type"], trigger["metadata"]["format"]) == ("metrics-api", "prometheus")
    told = Metrics(lambda _: True, lambda: True).render().decode()
    value = re.search(
        rf"^{re.escape(trigger['metadata']['valueLocation'])} (\S+)$", told, re.MULTILINE
    )
    assert value is not None
    assert float(value[1]) == 0


def test_the_scaled_object_scales_the_workers() -> None:
    spec = one("ScaledObject", "worker")["spec"]
    target = spec["scaleTargetRef"]
    scaled = one(target["kind"], target["name"])
    assert target["apiVersion"] == scaled["apiVersion"]
    # Else applying the file anew would set it back.
    assert "replicas" not in scaled["spec"]
    assert spec["minReplicaCount"] == 0
    assert spec["triggers"][0]["metadata"]["targetValue"] == "1"


def test_a_request_is_held_while_a_worker_comes() -> None:
    asked = settings("router")
    assert 0 < asked["wait_for_workers"] < asked["request_timeout"]


def test_models_leave_room_below_the_limit() -> None:
    limit = container("worker")["resources"]["limits"]["memory"]
    bytes_of_limit = parse_size(limit[:-2] + QUANTITIES[limit[-2:]])
    assert parse_size(settings("worker")["memory"]) <= 0.9 * bytes_of_limit


def test_labels_find_what_they_are_meant_to() -> None:
    labelled = [one("StatefulSet", part)["spec"]["template"]["metadata"]["labels"] for part in APPS]
    for part in APPS:
        selector = one("StatefulSet", part)["spec"]["selector"]["matchLabels"]
        assert [selector.items() <= labels.items() for labels in labelled].count(True) == 1
    service = one("Service", "router")["spec"]["selector"]
    assert service.items() <= labelled[0].items()
    nats = one("NetworkPolicy", "nats")["spec"]["ingress"][0]["from"][0]["podSelector"]
    assert all(nats["matchLabels"].items() <= labels.items() for labels in labelled)


def test_files_do_not_hold_passwords() -> None:
    for document in documents():
        assert document["kind"] != "Secret"
