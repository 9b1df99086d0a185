import io
import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mesh.narrator import Narrator, curl_line, fraction
from shared.presence import ModelState

URL = "http://127.0.0.1:9337/v1"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_a_shell_reads_the_curl_line_as_it_is_meant(model: str) -> None:
    words = shlex.split(curl_line(URL, model))
    assert words[:3] == ["curl", "-s", f"{URL}/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == model


@pytest.mark.parametrize(
    ("state", "detail", "wanted"),
    [
        ("loading", "loading 42%", 0.42),
        ("loading", "downloading 100%", 1.0),
        ("loading", "7%", 0.07),
        ("loading", "waiting", 0.0),
        ("loading", "", 0.0),
        ("ready", "", 1.0),
        ("failed", "50%", 1.0),
    ],
)
def test_progress_is_read_from_the_detail(state: str, detail: str, wanted: float) -> None:
    assert fraction(ModelState(name="m", state=state, detail=detail)) == wanted  # type: ignore[arg-type]


def narrate(terminal: bool) -> str:
    out = io.StringIO()
    narrator = Narrator(Console(file=out, force_terminal=terminal, width=60, no_color=True))
    narrator.step("NATS runs")
    for detail in ("loading 10%", "loading 60%"):
        narrator.loading("worker-1", ModelState(name="m", state="loading", detail=detail))
    narrator.loading("worker-1", ModelState(name="m", state="ready", slots=16, context=8192))
    narrator.warn("router-1 ended")
    narrator.ready([URL], ["a [bold]model[/] with a very long name that no line holds"], Path("/l"))
    return out.getvalue()


def test_without_a_terminal_it_is_plain_lines() -> None:
    lines = narrate(terminal=False).splitlines()
    assert lines[:4] == [
        "✓ NATS runs",
        "  worker-1 loads m",
        "✓ worker-1 serves m: 16 slots, 8192 tokens",
        "! router-1 ended",
    ]
    assert lines[4].startswith("✓ Mesh is ready after ")
    assert lines[5] == f"  base URL  {URL}"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_curl_line_is_never_wrapped_or_styled(terminal: bool) -> None:
    line = curl_line(URL, "a [bold]model[/] with a very long name that no line holds")
    assert line in narrate(terminal).splitlines()
