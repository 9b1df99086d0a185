"""The three servers of infra/nats as processes, with other ports and folders."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.broker import find_binary

__all__ = ("INFRA", "NODES", "NatsCluster")

INFRA = Path(__file__).parents[1] / "infra" / "nats"
NODES = ("cluster-1", "cluster-2", "cluster-3")
_READY_SECONDS = 30.0


class NatsCluster:
    """Servers 0 to 2; each may be ended and started again.

    Args:
        folder: for configurations, data and logs.
        users: text of users.conf.
        passwords: by user.
        variables: what `users` takes from the environment.
    """

    def __init__(
        self,
        folder: Path,
        *,
        users: str,
        passwords: Mapping[str, str],
        variables: Mapping[str, str] = {},
    ) -> None:
        self._folder = folder
        self._passwords = passwords
        ports = _free_ports(9)
        self._ports = ports[:3]
        self._monitors = ports[6:]
        routes = [f'"nats://route:route-secret@127.0.0.1:{port}"' for port in ports[3:6]]
        self._environment = {
            **os.environ,
            **variables,
            "MESH_ROUTE_PASSWORD": '"route-secret"',
            "MESH_ROUTES": f"[{', '.join(routes)}]",
        }
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        (folder / "users.conf").write_text(users)
        for number, name in enumerate(NODES):
            text = (INFRA / f"{name}.conf").read_text()
            for old, new in zip((4222, 6222, 8222), ports[number::3], strict=True):
                text, replaced = re.subn(rf"(: |:){old + 1000 * number}\b", rf"\g<1>{new}", text)
                assert replaced
            text = text.replace("data/nats", str(folder / "data"))
            (folder / f"{name}.conf").write_text(text)

    @property
    def log_file(self) -> Path:
        """The first server's."""
        return self._folder / f"{NODES[0]}.log"

    def url_of(self, number: int, user: str) -> str:
        """One server alone."""
        login = f"{quote(user, safe='')}:{quote(self._passwords[user], safe='')}"
        return f"nats://{login}@127.0.0.1:{self._ports[number]}"

    def url_for(self, user: str) -> str:
        """All three."""
        return ",".join(self.url_of(number, user) for number in range(len(NODES)))

    def pid(self, number: int) -> int:
        return self._processes[number].pid

    def start(self, *numbers: int) -> None:
        """Start servers, all without numbers; they may not be ready yet."""
        for number in numbers or range(len(NODES)):
            name = NODES[number]
            with (self._folder / f"{name}.log").open("ab") as log:
                self._processes[number] = subprocess.Popen(
                    [find_binary(), "-c", str(self._folder / f"{name}.conf")],
                    env=self._environment,
                    stdout=log,
                    stderr=log,
                )

    def signal(self, number: int, what: signal.Signals) -> None:
        self._processes[number].send_signal(what)

    def gone(self, number: int, within: float = _READY_SECONDS) -> None:
        """Wait until a server has ended."""
        self._processes.pop(number).wait(within)

    def ready(self) -> None:
        """Wait until all that run say that they are healthy, JetStream with them."""
        deadline = time.monotonic() + _READY_SECONDS
        for number in self._processes:
            while not self._healthy(number):
                assert time.monotonic() < deadline, (
                    self._folder / f"{NODES[number]}.log"
                ).read_text()
                time.sleep(0.05)

    def leader(self) -> int:
        """The server that leads JetStream."""
        told = self._monitor(next(iter(self._processes)), "jsz")
        name = told["meta_cluster"]["leader"]
        return int(name.removeprefix("mesh-")) - 1

    def clear_away(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _healthy(self, number: int) -> bool:
        try:
            return bool(self._monitor(number, "healthz")["status"] == "ok")
        except OSError:
            return False

    def _monitor(self, number: int, page: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self._monitors[number]}/{page}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            told: dict[str, Any] = json.load(answer)
        return told


def _free_ports(count: int) -> Sequence[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports
