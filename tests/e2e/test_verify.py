"""`mesh verify` on real systems: one that is left alone, and one whose worker it kills."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mesh_process import MeshUp, clean_environment, mesh_command
from test_failover import WORKERS, running_pair

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


def verify(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        mesh_command("verify", url, *arguments),
        capture_output=True,
        text=True,
        env=clean_environment() | {"COLUMNS": "160"},
        timeout=240,
        check=False,
    )


def outcomes(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    assert done.stderr == ""
    return {row["name"]: row for row in json.loads(done.stdout)["checks"]}


def test_a_system_passes_all_that_does_not_hurt(mesh_system: MeshUp) -> None:
    done = verify(mesh_system.base_url, "--burst", "12", "--json")
    checks = outcomes(done)
    for name, row in checks.items():
        hurts = name.startswith("failover.")
        assert row["outcome"] == ("skipped" if hurts else "pass"), f"{row}\n{mesh_system.story()}"
    assert done.returncode == 0
    assert "given up within" in checks["cancel.many"]["detail"]


def test_the_report_is_a_table(mesh_system: MeshUp) -> None:
    done = verify(mesh_system.base_url, "--only", "conformance.models", "--only", "failover")
    assert (done.returncode, done.stderr) == (0, "")
    words = [line.split()[:2] for line in done.stdout.splitlines() if line]
    assert words[:2] == [["check", "result"], ["conformance.models", "pass"]]
    assert f"1 passed, 0 failed, 2 skipped at {mesh_system.base_url}" in done.stdout


@pytest.mark.chaos
def test_a_worker_is_killed_and_the_streams_go_on(tmp_path: Path) -> None:
    with running_pair(tmp_path) as pair:
        victim = pair.process(WORKERS[0])
        named = ("--kill-pid", str(victim.pid), "--only", "failover.kill", "--json")
        done = verify(pair.base_url, "--streams", "6", *named)
        row = outcomes(done)["failover.kill"]
        assert (done.returncode, row["outcome"]) == (0, "pass"), f"{row}\n{pair.story()}"
        assert "6 of 6 whole" in row["detail"]
        assert "went on elsewhere" in row["detail"]
        assert pair.ended(WORKERS[0]) == -9
