"""The Locust file against the whole system: it runs, fails nothing, and has rows of its own."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from mesh_process import MeshUp, clean_environment

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

LOCUSTFILE = Path(__file__).parents[2] / "loadtests" / "locustfile.py"


def test_first_tokens_and_gaps_are_reported_beside_the_requests(
    mesh_system: MeshUp, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["-u", "3", "-r", "3", "-t", "10s", "--stop-timeout", "30"]
    command += ["--host", mesh_system.base_url.removesuffix("/v1"), "--csv", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment() | {"MESH_LOAD_TOKENS": "8"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run_stats.csv").open() as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    assert all(row["Failure Count"] == "0" for row in rows.values()), rows
    kinds = {kind for kind, _ in rows}
    assert {"TTFT", "inter-token"} <= kinds, rows.keys()
    for (kind, name), row in rows.items():
        assert int(row["Request Count"]) > 0, (kind, name)
        if kind in ("TTFT", "inter-token"):
            assert 0 < float(row["Median Response Time"]) < 30_000
