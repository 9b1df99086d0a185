"""The configurations in infra/nats, read by the real server; the cluster also run."""

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import subjects
from shared.broker import Identity, find_binary, render, render_users
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.kv import ROLES, Entry, Kv
from tests.nats_cluster import INFRA, NODES, NatsCluster

pytestmark = pytest.mark.nats

KINDS = {
    "router-1": "router",
    "router-2": "router",
    "worker-1": "worker",
    "worker-2": "worker",
    "observer": "mesh",
}


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
    result = check(INFRA / f"{name}.conf", environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("missing", [*map(variable, KINDS), "MESH_ROUTE_PASSWORD", "MESH_ROUTES"])
def test_it_does_not_start_without_a_password(missing: str, environment: dict[str, str]) -> None:
    del environment[missing]
    result = check(INFRA / "cluster-1.conf", environment)
    assert result.returncode != 0
    assert missing in result.stderr


def test_the_users_are_what_the_code_grants() -> None:
    assert body(INFRA / "users.conf") == render_users(identities(*KINDS))


def test_embedded_is_what_mesh_up_gives() -> None:
    expected = render(
        identities("router-1", "worker-1", "observer"), port=4222, store_dir="data/nats"
    )
    assert body(INFRA / "embedded.conf") == expected


@pytest.mark.parametrize("name", ["embedded", "single", *NODES])
def test_it_listens_on_loopback_until_told_otherwise(name: str) -> None:
    text = re.sub(r"#.*", "", (INFRA / f"{name}.conf").read_text())
    assert set(re.findall(r'host: "(.*?)"', text)) == {"127.0.0.1"}
    assert not re.search(r"0\.0\.0\.0|listen:", text)
    assert all(address.startswith("127.0.0.1:") for address in re.findall(r'http: "(.*?)"', text))


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[NatsCluster]:
    """The three servers, with the users that infra/nats has."""
    made = NatsCluster(
        tmp_path,
        users=(INFRA / "users.conf").read_text(),
        passwords={name: f"{name} secret" for name in KINDS},
        variables=environment,
    )
    try:
        made.start()
        yield made
    finally:
        made.clear_away()


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
    cluster: NatsCluster, eventually: Any, unique: str
) -> None:
    """One address is enough: the others are learnt, and entered with the same password."""
    router_context, router = await connected(cluster.url_of(0, "router-1"), "router-1", "router")
    worker_context, worker = await connected(cluster.url_of(2, "worker-1"), "worker-1", "worker")
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
        cluster.signal(0, signal.SIGKILL)
        await eventually(lambda: not router.connected)
        await eventually(lambda: router.connected)
        statuses.clear()
        await served()
        await worker.publish(got[-1].reply, b"frame")
        await eventually(lambda: "" in statuses)
    finally:
        await router_context.__aexit__(None, None, None)
        await worker_context.__aexit__(None, None, None)


async def test_buckets_outlive_one_of_the_servers(cluster: NatsCluster, eventually: Any) -> None:
    """Three servers hold them; another becomes the leader."""
    router_context, router = await connected(cluster.url_of(0, "router-1"), "router-1", "router")
    worker_context, worker = await connected(cluster.url_of(2, "worker-1"), "worker-1", "worker")
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
        cluster.signal(0, signal.SIGKILL)
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
