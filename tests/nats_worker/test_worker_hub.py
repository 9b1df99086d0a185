"""Downloading from a server that speaks what huggingface_hub needs, in a process of its own.

huggingface_hub reads HF_ENDPOINT when it is imported, so each case runs in a fresh interpreter.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from layered_gguf import write_layers

from worker.hub import HubError, HubSource, parse_source

COMMIT = "c" * 40

SCRIPT = """
import json, sys, threading
from pathlib import Path
from worker.hub import DownloadStopped, HubError, fetch, parse_source
seen, stop = [], threading.Event()
def progress(share):
    seen.append(share)
    if sys.argv[3] == "stop":
        stop.set()
try:
    path = fetch(parse_source(sys.argv[1]), Path(sys.argv[2]), progress=progress, stop=stop)
    print(json.dumps({"path": str(path), "seen": seen}))
except (HubError, DownloadStopped) as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


CARRY = """
import asyncio, json, sys, threading
from pathlib import Path
from shared.groups import Group, Part
from worker.catalog import ModelOptions, ModelSource
from worker.hub import parse_source
from worker.loadable import survey
from worker.part import prepare_part
from worker.preparing import ServingSettings
source = parse_source(sys.argv[1])
model = ModelSource("m", source, ModelOptions(file=sys.argv[1]))
settings = ServingSettings(slots=1, context=256, cache=Path(sys.argv[2]), speculation="off")
named = {"m"} if sys.argv[3] == "named" else set()
found = survey([model], settings, 4 << 20, named)
told = {"whole": len(found.whole), "split": [s.source.name for s in found.split]}
if found.split:
    (split,) = found.split
    group = Group("g", split.digest, (Part("a", 0, 1, 1), Part("b", 1, 6, 1)), 1, 256, 32)
    config = asyncio.run(prepare_part(
        split, settings, group, worker="a", nats="nats://a:b@127.0.0.1:1",
        stopping=threading.Event(), tell=lambda _: None,
    ))
    told["path"] = config.path
print(json.dumps(told))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves `/<owner>/<repo>/resolve/<revision>/<file>` from a dictionary."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []
        self.ranges: list[int] = []
        """Bytes of each part of a file that was asked for."""
        super().__init__(("127.0.0.1", 0), HubHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        _, _, file = rest.partition("/")
        data = self.server.files.get(f"{repo}:{file}")
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole, asked = data, self.headers.get("Range")
        if asked:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.server.ranges.append(len(data))
            self.send_response(206)
            told = f"bytes {first}-{first + len(data) - 1}/{len(whole)}"
            self.send_header("Content-Range", told)
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(
        {
            "owner/repo:tiny.gguf": b"GGUF" + bytes(40_000_000),
            "owner/repo:dir/big-00001-of-00002.gguf": b"GGUF" + bytes(1000),
            "owner/repo:dir/big-00002-of-00002.gguf": b"GGUF" + bytes(2000),
            "owner/repo:half-00001-of-00002.gguf": b"GGUF",
        }
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetched(tmp_path: Path) -> Callable[..., dict]:
    def fetch(source: str, endpoint: str, *, stop: bool = False) -> dict:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, source, str(tmp_path / "cache"), "stop" * stop],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return fetch


def test_a_file_is_downloaded_with_progress_and_then_kept(hub: Hub, fetched, tmp_path: Path):
    first = fetched("hf:owner/repo:tiny.gguf", hub.url)
    path = Path(first["path"])
    assert path.is_relative_to(tmp_path / "cache")
    assert path.read_bytes() == hub.files["owner/repo:tiny.gguf"]
    assert first["seen"][-1] == 1.0
    assert first["seen"] == sorted(first["seen"])
    assert len(first["seen"]) > 1
    gets = [request for request in hub.requests if request.startswith("GET")]
    again = fetched("hf:owner/repo:tiny.gguf", hub.url)
    assert again == {"path": str(path), "seen": []}
    assert [request for request in hub.requests if request.startswith("GET")] == gets


def test_of_a_model_that_is_too_large_only_a_part_comes(hub: Hub, tmp_path: Path):
    """Six layers of a megabyte each, of which this worker is to have one."""
    file = write_layers(tmp_path / "large.gguf", layers=6)
    hub.files["owner/repo:large.gguf"] = data = file.read_bytes()

    def carry(named: str) -> dict:
        cache = str(tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, "-c", CARRY, "hf:owner/repo:large.gguf", cache, named],
            env=os.environ | {"HF_ENDPOINT": hub.url, "MESH_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    # Of what nobody has named nothing is looked at.
    assert carry("") == {"whole": 0, "split": []}
    assert hub.requests == []
    told = carry("named")
    assert (told["whole"], told["split"]) == (0, ["m"])
    stage = Path(told["path"])
    assert 1 << 20 < stage.stat().st_size < (1 << 20) + 100_000
    assert len(data) > 6 << 20
    # The first megabyte three times, for the header, and the layer.
    assert sum(hub.ranges) < 4.01 * (1 << 20)


def test_all_parts_of_a_split_model_come(hub: Hub, fetched):
    path = Path(fetched("hf:owner/repo:dir/big-00001-of-00002.gguf", hub.url)["path"])
    assert path.name == "big-00001-of-00002.gguf"
    second = path.with_name("big-00002-of-00002.gguf")
    assert second.stat().st_size == 2004


def test_a_download_can_be_stopped(hub: Hub, fetched):
    stopped = fetched("hf:owner/repo:tiny.gguf", hub.url, stop=True)
    assert stopped["error"] == "DownloadStopped"


@pytest.mark.parametrize(
    "source", ["hf:owner/repo:none.gguf", "hf:owner/repo:half-00001-of-00002.gguf"]
)
def test_a_file_that_is_not_there_is_one_line(hub: Hub, fetched, source: str):
    failed = fetched(source, hub.url)
    assert failed["error"] == "HubError"
    assert "owner/repo: " in failed["message"]
    assert ".gguf: " in failed["message"]
    assert "404" in failed["message"]
    assert "\n" not in failed["message"]


def test_no_hub_is_one_line(fetched):
    failed = fetched("hf:owner/repo:tiny.gguf", "http://127.0.0.1:1")
    assert failed["error"] == "HubError"
    assert failed["message"] == "owner/repo: tiny.gguf: the hub cannot be reached"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:o/r:a.gguf", HubSource("o/r", "a.gguf")),
        ("hf:o/r.x:d/a-b.gguf@v1", HubSource("o/r.x", "d/a-b.gguf", "v1")),
    ],
)
def test_sources(text: str, source: HubSource):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:o:a.gguf",
        "hf:o/r",
        "hf:o/r:a.bin",
        "hf:o/r:../a.gguf",
        "o/r:a.gguf",
        "hf:/r:a.gguf",
    ],
)
def test_what_is_no_source(text: str):
    with pytest.raises(HubError, match="wanted hf:owner/repo"):
        parse_source(text)
