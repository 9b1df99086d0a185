"""The configurations in infra/nats, read by the real server; the cluster also run."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import subjects
from shared.broker import Identity, find_binary, render, render_users
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.kv import ROLES, Entry, Kv

pytestmark = pytest.mark.nats

FOLDER = Path(__file__).parents[2] / "infra" / "nats"
KINDS = {
    "router-1": "router",
    "router-2": "router",
    "worker-1": "worker",
    "worker-2": "worker",
    "observer": "mesh",
}
NODES = ("cluster-1", "cluster-2", "cluster-3")


def variable(name: str) -> str:
    return f"MESH_PASSWORD_{name.upper().replace('-', '_')}"


def identities(*names: str) -> list[Identity]:
    return [Identity(name, KINDS[name], f"${variable(name)}") for name in names]  # type: ignore[arg-type]


@pytest.fixture
def environment() -> dict[str, str]:
    passwords = {variable(name): f'"{name} secret"' for name in KINDS}
    return {
        **passwords,
        "MESH_ROUTE_PASSWORD": '"route-secret"',
        "MESH_ROUTES": '["nats://route:route-secret@127.0.0.1:6222"]',
    }


def check(config: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find_binary(), "-t", "-c", str(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def body(config: Path) -> str:
    """A configuration without the comment on its top."""
    return config.read_text().split("\n\n", 1)[1]


@pytest.mark.parametrize("name", ["embedded", "single", *NODES])
def test_the_server_takes_it(name: str, environment: dict[str, str]) -> None:
    result = check(FOLDER / f"{name}.conf", environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("missing", [*map(variable, KINDS), "MESH_ROUTE_PASSWORD", "MESH_ROUTES"])
def test_it_does_not_start_without_a_password(missing: str, environment: dict[str, str]) -> None:
    del environment[missing]
    result = check(FOLDER / "cluster-1.conf", environment)
    assert result.returncode != 0
    assert missing in result.stderr


def test_the_users_are_what_the_code_grants() -> None:
    assert body(FOLDER / "users.conf") == render_users(identities(*KINDS))


def test_embedded_is_what_mesh_up_gives() -> None:
    expected = render(
        identities("router-1", "worker-1", "observer"), port=4222, store_dir="data/nats"
    )
    assert body(FOLDER / "embedded.conf") == expected


@pytest.mark.parametrize("name", ["embedded", "single", *NODES])
def test_it_listens_on_loopback_until_told_otherwise(name: str) -> None:
    text = re.sub(r"#.*", "", (FOLDER / f"{name}.conf").read_text())
    assert set(re.findall(r'host: "(.*?)"', text)) == {"127.0.0.1"}
    assert not re.search(r"0\.0\.0\.0|listen:", text)
    assert all(address.startswith("127.0.0.1:") for address in re.findall(r'http: "(.*?)"', text))


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


class Node:
    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def url(self, name: str) -> str:
        return f"nats://{name}:{name}%20secret@127.0.0.1:{self.port}"


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[list[Node]]:
    """The three servers of infra/nats, with other ports and folders."""
    ports = free_ports(9)
    routes = [f'"nats://route:route-secret@127.0.0.1:{port}"' for port in ports[3:6]]
    environment["MESH_ROUTES"] = f"[{', '.join(routes)}]"
    shutil.copy(FOLDER / "users.conf", tmp_path)
    nodes: list[Node] = []
    try:
        for number, name in enumerate(NODES):
            text = (FOLDER / f"{name}.conf").read_text()
            for old, new in zip((4222, 6222, 8222), ports[number::3], strict=True):
                text, replaced = re.subn(rf"(: |:){old + 1000 * number}\b", rf"\g<1>{new}", text)
                assert replaced
            config = tmp_path / f"{name}.conf"
            config.write_text(text.replace("data/nats", str(tmp_path / "data")))
            with (tmp_path / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    [find_binary(), "-c", str(config)], env=environment, stdout=log, stderr=log
                )
            nodes.append(Node(process, ports[number]))
        yield nodes
    finally:
        for node in nodes:
            node.process.kill()
        for node in nodes:
            node.process.wait()


async def connected(url: str, identity: str, kind: Any) -> Any:
    """Enter a bus as soon as the server is up."""
    async with asyncio.timeout(30):
        while True:
            context = Bus.connect(url, identity=identity, kind=kind)
            try:
                return context, await context.__aenter__()
            except BusUnavailable:
                await asyncio.sleep(0.05)


async def test_a_cluster_outlives_one_of_its_servers(
    cluster: list[Node], eventually: Any, unique: str
) -> None:
    """One address is enough: the others are learnt, and entered with the same password."""
    router_context, router = await connected(cluster[0].url("router-1"), "router-1", "router")
    worker_context, worker = await connected(cluster[2].url("worker-1"), "worker-1", "worker")
    try:
        await eventually(lambda: len(router._client.servers) == 3)
        got: list[BusMessage] = []
        statuses: list[str] = []
        await worker.subscribe(subjects.infer(unique), got.append, queue=subjects.FREE)
        await router.subscribe(f"{router.inbox}.r.*", lambda m: statuses.append(m.status))
        await worker.barrier()

        async def served() -> None:
            """Send until it arrives: interest spreads between servers in its own time."""
            before = len(got)
            async with asyncio.timeout(20):
                while len(got) == before:
                    await router.publish(subjects.infer(unique), b"", reply=f"{router.inbox}.r.1")
                    await asyncio.sleep(0.05)

        await served()
        os.kill(cluster[0].process.pid, signal.SIGKILL)
        await eventually(lambda: not router.connected)
        await eventually(lambda: router.connected)
        statuses.clear()
        await served()
        await worker.publish(got[-1].reply, b"frame")
        await eventually(lambda: "" in statuses)
    finally:
        await router_context.__aexit__(None, None, None)
        await worker_context.__aexit__(None, None, None)


async def test_buckets_outlive_one_of_the_servers(cluster: list[Node], eventually: Any) -> None:
    """Three servers hold them; another becomes the leader."""
    router_context, router = await connected(cluster[0].url("router-1"), "router-1", "router")
    worker_context, worker = await connected(cluster[2].url("worker-1"), "worker-1", "worker")
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    await Kv(router).make(ROLES)
                    break
                except BusUnavailable:
                    await asyncio.sleep(0.1)  # the servers have yet to agree on a leader
        told: list[Entry] = []
        await Kv(worker).follow(ROLES, told.append)
        await worker.barrier()
        async with asyncio.timeout(60):
            while not told:
                await Kv(worker).tell(ROLES, "m.0", b"first", 0)
                await asyncio.sleep(0.2)
        os.kill(cluster[0].process.pid, signal.SIGKILL)
        await eventually(lambda: not router.connected)
        await eventually(lambda: router.connected)
        async with asyncio.timeout(60):
            while told[-1].value != b"second":
                # Either the lease is still there, or it has expired while there was no leader.
                for revision in (told[0].revision, 0):
                    await Kv(worker).tell(ROLES, "m.0", b"second", revision)
                await asyncio.sleep(0.2)
        assert [entry.value for entry in told] == [b"first", b"second"]
    finally:
        await router_context.__aexit__(None, None, None)
        await worker_context.__aexit__(None, None, None)
