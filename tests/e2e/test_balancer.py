"""Two routers behind the HAProxy configuration of infra/, two workers, every one a real process.

Nothing here tries a request again: what the balancer does not heal has failed.
"""

import asyncio
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mesh_process import MeshUp, clean_environment, mesh_command
from prometheus_client.parser import text_string_to_metric_families
from proxied_load import MIX, STREAMED, Load, Outcome

PROXY = Path(__file__).parents[2] / "infra" / "proxy"
ROUTERS = ("router-1", "router-2")
WORKERS = ("worker-1", "worker-2")
AT_ONCE = 20

pytestmark = [pytest.mark.model, pytest.mark.haproxy, pytest.mark.timeout(420)]


def program(name: str) -> str | None:
    """Where it is; distributions keep daemons in folders that not every PATH holds."""
    places = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")
    return shutil.which(name, path=os.pathsep.join(places))


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


class Balancer:
    """HAProxy with the configuration that users are given, told our ports by its environment."""

    def __init__(self, folder: Path, routers: list[str]) -> None:
        binary = program("haproxy")
        assert binary is not None, 'haproxy is not installed; `-m "not haproxy"` leaves this out'
        bind, statistics = (f"127.0.0.1:{port}" for port in free_ports(2))
        self.url = f"http://{bind}/v1"
        self._statistics = f"http://{statistics}/;csv"
        self._log = folder / "haproxy.log"
        addresses = {f"MESH_ROUTER_{number}": at for number, at in enumerate(routers, 1)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [binary, "-db", "-f", str(PROXY / "haproxy.cfg")],
                env=clean_environment()
                | {"MESH_PROXY_BIND": bind, "MESH_PROXY_STATS": statistics, **addresses},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def servers(self) -> dict[str, dict[str, str]]:
        """HAProxy's own row about each router."""
        text = httpx.get(self._statistics, trust_env=False, timeout=10).text
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return {
            row["svname"]: row
            for row in rows
            if row["pxname"] == "routers" and row["svname"] in ROUTERS
        }

    def all_up(self) -> bool:
        """Whether it would send requests to every router."""
        assert self.process.poll() is None, self._log.read_text()
        try:
            servers = self.servers()
        except httpx.TransportError:
            return False
        return [servers[name]["status"] for name in ROUTERS] == ["UP", "UP"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshUp]:
    """Two routers and two workers."""
    system = MeshUp(
        tmp_path_factory.mktemp("balanced"),
        *("--routers", "2", "--workers", "2"),
        *("--threads", "1", "--slots", "4", "--ctx", "1024"),
    )
    try:
        yield system.until_ready()
        assert system.end() == 0, system.story()
        assert system.left() == []
    finally:
        system.clear_away()


def router_urls(system: MeshUp) -> list[str]:
    return [line.split()[-1] for line in system.text.splitlines() if "base URL" in line]


@pytest.fixture(scope="module")
def balancer(pair: MeshUp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    addresses = [httpx.URL(url).netloc.decode() for url in router_urls(pair)]
    assert len(addresses) == len(ROUTERS)
    found = Balancer(tmp_path_factory.mktemp("balancer"), addresses)
    try:
        until_now(found.all_up)
        yield found
    finally:
        found.end()


def until_now(holds: Callable[[], object], within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


async def until(holds: Callable[[], object], within: float = 60.0) -> None:
    await asyncio.to_thread(until_now, holds, within)


def answered(system: MeshUp) -> list[int]:
    """Requests that each router has answered with 200, by its own count."""
    counts = []
    for url in router_urls(system):
        text = httpx.get(url.replace("/v1", "/metrics"), trust_env=False, timeout=10).text
        counts.append(
            sum(
                int(sample.value)
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == "mesh_router_requests_total" and sample.labels["status"] == "200"
            )
        )
    return counts


def reused(system: MeshUp) -> dict[str, int]:
    """Prompt tokens each worker has taken from its cache so far: every chat here brings some."""
    done = subprocess.run(
        mesh_command("status", "--json", "--data-dir", str(system.data_dir)),
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
        check=True,
    )
    status: dict[str, Any] = json.loads(done.stdout)
    return {
        worker["worker"]: sum(model.get("cached_tokens", 0) for model in worker["models"])
        for worker in status["workers"]
    }


def story(outcomes: list[Outcome]) -> str:
    return "\n".join(str(outcome) for outcome in outcomes)


@pytest.mark.parametrize("requests", [120, pytest.param(500, marks=pytest.mark.slow)])
async def test_requests_of_all_kinds_none_failed(
    pair: MeshUp, balancer: Balancer, requests: int
) -> None:
    answered_before, reused_before = answered(pair), reused(pair)
    load = Load(balancer.url, pair.model, at_once=AT_ONCE)

    await load.run(requests)

    failed = [outcome for outcome in load.outcomes if outcome.error]
    assert not failed, story(failed)
    assert len(load.outcomes) == requests
    assert {outcome.kind for outcome in load.outcomes} == set(MIX)
    by_router = [now - then for now, then in zip(answered(pair), answered_before, strict=True)]
    assert sum(by_router) == requests
    assert min(by_router) >= requests // 4, by_router
    reused_now = reused(pair)
    assert sorted(reused_now) == sorted(WORKERS)
    assert all(reused_now[name] > reused_before[name] + requests for name in WORKERS), reused_now


async def test_a_router_that_is_killed_fails_no_new_request(
    pair: MeshUp, balancer: Balancer
) -> None:
    """Requests that the router was answering may break; those that begin later never."""
    load = Load(balancer.url, pair.model, at_once=AT_ONCE)
    kills: list[tuple[float, float]] = []

    async def kill_in_turn() -> None:
        for name in ROUTERS:
            busy = len(load.outcomes)
            await until(lambda busy=busy: len(load.outcomes) >= busy + AT_ONCE)
            pid = pair.pids[name]
            before = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            kills.append((before, time.monotonic()))
            await until(lambda name=name, pid=pid: pair.pids.get(name, pid) != pid)
            await until(balancer.all_up)
        served = answered(pair)
        await until(
            lambda: all(
                now > then + AT_ONCE for now, then in zip(answered(pair), served, strict=True)
            )
        )
        load.enough.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        group.create_task(kill_in_turn())

    failed = [outcome for outcome in load.outcomes if outcome.error]
    in_flight = [
        outcome
        for outcome in failed
        if any(outcome.began < killed and outcome.ended > before for before, killed in kills)
    ]
    new = [outcome for outcome in failed if outcome not in in_flight]
    assert not new, story(new)
    # Whatever had not begun to be answered was brought to the other router.
    assert all(outcome.kind in STREAMED for outcome in in_flight), story(in_flight)
    assert len(in_flight) <= 2 * AT_ONCE
    later = [outcome for outcome in load.outcomes if outcome.began > kills[-1][1]]
    assert len(later) > 2 * AT_ONCE


async def test_what_is_sent_again_finds_the_router_that_has_the_answer(
    pair: MeshUp, balancer: Balancer
) -> None:
    """Also while it is made; sixteen keys, so that chance would be right once in 65,536 times."""
    body = {
        "model": pair.model,
        "messages": [{"role": "user", "content": "Tell me about bread."}],
        "max_tokens": 8,
    }

    async def ask(client: httpx.AsyncClient, key: int) -> httpx.Response:
        headers = {"Idempotency-Key": f"bread-{key}"}
        return await client.post(
            f"{balancer.url}/chat/completions", json={**body, "seed": key}, headers=headers
        )

    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        before = answered(pair)
        # Two of each key at once: one joins the other.
        pairs = await asyncio.gather(*(ask(client, key) for key in (*range(16), *range(16))))
        after = answered(pair)
        again = await asyncio.gather(*(ask(client, key) for key in range(16)))
    assert [one.status_code for one in (*pairs, *again)] == [200] * 48
    for first, second, third in zip(pairs[:16], pairs[16:], again, strict=True):
        assert first.json() == second.json() == third.json()
        replays = [one.headers.get("idempotent-replayed") for one in (first, second)]
        assert sorted(map(str, replays)) == ["None", "true"]
        assert third.headers["idempotent-replayed"] == "true"
    # And both routers were used.
    assert all(now > then for now, then in zip(after, before, strict=True))


async def test_what_belongs_to_one_router_is_not_shown_to_clients(balancer: Balancer) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        answer = await client.get(balancer.url.replace("/v1", "/metrics"))
        assert answer.status_code == 404
        named = await client.get(f"{balancer.url}/models", headers={"X-Request-Id": "mine-1"})
        unnamed = await client.get(f"{balancer.url}/models")
    assert named.headers["x-request-id"] == "mine-1"
    assert re.fullmatch(r"[0-9a-f-]{36}", unnamed.headers["x-request-id"])
