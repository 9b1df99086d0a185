"""What the README shows must work as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mesh_process import MeshUp, clean_environment

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

README = Path(__file__).parents[2] / "README.md"
SHOWN = "http://127.0.0.1:9337/v1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_curl_line_answers(mesh_system: MeshUp) -> None:
    (line,) = [block for block in blocks("sh") if block.startswith("curl ")]
    assert SHOWN in line
    line = line.replace(SHOWN, mesh_system.base_url)
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_example_for_the_openai_client_answers(mesh_system: MeshUp, tmp_path: Path) -> None:
    (example,) = blocks("python")
    assert SHOWN in example
    script = tmp_path / "example.py"
    script.write_text(example.replace(SHOWN, mesh_system.base_url))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10


def test_every_target_that_is_named_exists() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][a-z-]+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert (README.parent / link).exists(), link
