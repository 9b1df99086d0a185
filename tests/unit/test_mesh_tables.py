"""What `mesh status` says beside its figures."""

from rich.console import Console

from mesh.fleet import Snapshot
from mesh.tables import status_view
from shared.presence import Beat, ModelState


def shown(*workers: Beat) -> str:
    console = Console(width=400, highlight=False)
    with console.capture() as captured:
        console.print(status_view(Snapshot(workers, (), ()), now=0.0))
    return captured.get()


def test_advice_is_told_once_for_all_workers_that_give_it() -> None:
    fast = ModelState("fast", "ready")
    slow = ModelState("slow", "ready", detail="mesh models requantize a b --type Q4_0")
    text = shown(*(Beat(f"worker-{n}", "ready", 1, models=(fast, slow)) for n in (1, 2)))
    assert text.count("requantize") == 1
    assert "! worker-1: slow: mesh models requantize a b --type Q4_0" in text


def test_progress_and_failures_are_no_advice() -> None:
    states = (
        ModelState("a", "loading", detail="loading 40%"),
        ModelState("b", "failed", detail="no memory"),
    )
    text = shown(Beat("worker-1", "ready", 1, models=states))
    assert "loading 40%" in text
    assert "!" not in text
