"""OpenAI's own Node client, as pinned in `node/`, on the whole system and the real model."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mesh_process import MeshUp, clean_environment

pytestmark = [pytest.mark.model, pytest.mark.npm, pytest.mark.timeout(420)]

SOURCES = Path(__file__).parent / "node"
OLDEST_NODE = 18


def program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, (
        f"{name} is not installed: install Node.js {OLDEST_NODE} or newer with npm, "
        'or leave this out with `-m "not npm"`'
    )
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The script beside the packages that its lock file names."""
    folder = tmp_path_factory.mktemp("node") / "project"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("node_modules"))
    done = subprocess.run(
        [program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"npm ci failed; it needs a registry\n{done.stdout}{done.stderr}"
    yield folder
    shutil.rmtree(folder)


def test_the_node_client_works(project: Path, mesh_system: MeshUp):
    node = program("node")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    assert int(version.strip().lstrip("v").partition(".")[0]) >= OLDEST_NODE, (
        f"Node.js {OLDEST_NODE} or newer is needed, {node} is {version}"
    )
    done = subprocess.run(
        [node, "--test-reporter=tap", "client.mjs"],
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=clean_environment()
        | {"MESH_TEST_URL": mesh_system.base_url, "MESH_TEST_MODEL": mesh_system.model},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^# (\w+) (\d+)$", done.stdout, re.MULTILINE))
    written = len(re.findall(r"^test\(", (SOURCES / "client.mjs").read_text(), re.MULTILINE))
    assert int(counts["pass"]) == written > 0, done.stdout
