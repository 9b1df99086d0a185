"""What `mesh status` says beside its figures."""

from rich.console import Console

from mesh.fleet import Snapshot
from mesh.tables import status_view
from shared.presence import Beat, ModelState, RoleChange


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


def test_role_changes_are_told_with_their_reason_the_newest_first() -> None:
    first = RoleChange(1.0, "a", "promote", "3 waiting since 0.1 s")
    second = RoleChange(2.0, "a", "demote", "idle for 60 s")
    text = shown(
        Beat("worker-1", "ready", 1, changes=(first,)),
        Beat("worker-2", "ready", 1, changes=(second,)),
    )
    assert text.index("idle for 60 s") < text.index("3 waiting since 0.1 s")
    assert "role changes" not in shown(Beat("worker-1", "ready", 1))
