"""Three workers that carry a model together, under a mixed load; then one loses its part."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mesh_process import MeshUp, clean_environment, mesh_command
from proxied_load import (
    Kind,
    Load,
    chat,
    chat_streamed,
    completion,
    completion_streamed,
    schema,
    several_choices,
    tools,
)

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1200)]

REQUESTS = int(os.environ.get("MESH_SPLIT_REQUESTS", "500"))
AT_ONCE = 8
START = "You are the keeper of a lighthouse on a small island, far from the coast. " * 3


async def leaves(client: httpx.AsyncClient, model: str, number: int) -> None:
    """A client that goes away when it has seen a little of a long answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me a story about {number} ships."}],
        "max_tokens": 200,
        "stream": True,
    }
    async with client.stream("POST", "/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        seen = 0
        async for line in response.aiter_lines():
            seen += line.startswith("data: ")
            if seen > 3:
                return
    raise AssertionError("the answer was over before its reader had left")


async def goes_on(client: httpx.AsyncClient, model: str, number: int) -> None:
    """Two turns of one conversation: the second begins with all of the first."""
    messages: list[dict[str, str]] = [{"role": "system", "content": START}]
    for turn in range(2):
        messages.append({"role": "user", "content": f"What did you see on day {number + turn}?"})
        body = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0}
        answer = await client.post("/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        said = answer.json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": said})


MIX: tuple[Kind, ...] = (
    *(chat, leaves, chat_streamed, goes_on, completion, completion_streamed) * 3,
    *(several_choices, schema, leaves, tools),
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshUp]:
    folder = tmp_path_factory.mktemp("split-load")
    made = MeshUp(
        folder,
        *("--workers", "3", "--threads", "1", "--slots", "4", "--ctx", "1024"),
        settings={"MESH_MEMORY": "55MB", "MESH_CACHE_DIR": str(folder / "cache")},
    )
    try:
        yield made.until_ready()
        assert made.end() == 0, made.story()
        assert made.left() == []
    finally:
        made.clear_away()


def told(system: MeshUp) -> dict[str, Any]:
    done = subprocess.run(
        mesh_command("status", "--json", "--data-dir", str(system.data_dir)),
        capture_output=True,
        env=clean_environment(),
        timeout=60,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def head(system: MeshUp) -> dict[str, Any]:
    """What the head says of the model."""
    states = [model for worker in told(system)["workers"] for model in worker.get("models", ())]
    (state,) = states
    return dict(state)


def at_rest(system: MeshUp) -> bool:
    state = head(system)
    return (
        state.get("state") == "ready"
        and state["free"] == state["slots"]
        and not state.get("queued", 0)
        and not state.get("busy", 0)
    )


def until_at_rest(system: MeshUp) -> None:
    deadline = time.monotonic() + 30
    while not at_rest(system):
        assert time.monotonic() < deadline, (head(system), system.story())
        time.sleep(0.2)


async def test_a_mixed_load_with_readers_that_leave_is_answered_and_leaves_nothing(
    system: MeshUp,
) -> None:
    stages = [stage for worker in told(system)["workers"] for stage in worker.get("stages", ())]
    assert len(stages) == 3
    load = Load(system.base_url, MeshUp.model, at_once=AT_ONCE, mix=MIX, timeout=240)
    began = time.monotonic()
    await load.run(REQUESTS)
    failed = [str(outcome) for outcome in load.outcomes if outcome.error is not None]
    print(f"{len(load.outcomes)} requests in {time.monotonic() - began:.0f} s, failed: {failed}")
    assert len(load.outcomes) == REQUESTS
    assert not failed
    until_at_rest(system)
    state = head(system)
    assert state["cached_tokens"] > 0.3 * state["prompt_tokens"], state
    assert not state.get("restarts", 0)


async def test_a_part_that_is_lost_under_load_costs_a_pause(system: MeshUp) -> None:
    """All that were under way go on when the group is there again."""
    workers = told(system)["workers"]
    victim = next(
        worker["worker"]
        for worker in workers
        if any(stage["memory"] for stage in worker.get("stages", ()))
    )
    load = Load(system.base_url, MeshUp.model, at_once=AT_ONCE, mix=MIX, timeout=240)
    running = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(10)
        before = len(load.outcomes)
        killed = time.monotonic()
        os.kill(system.pids[f"engine of {victim}"], signal.SIGKILL)
        await asyncio.sleep(25)
    finally:
        load.enough.set()
        await running
    failed = [str(outcome) for outcome in load.outcomes if outcome.error is not None]
    after = [o.ended - killed for o in load.outcomes if o.ended > killed and o.began < killed]
    fresh = [o.ended - killed for o in load.outcomes if o.began > killed]
    assert before
    assert after
    assert fresh
    print(
        f"{before} before; the first answer that was under way came {min(after):.1f} s after the "
        f"kill, the last one {max(after):.1f} s; the first new one {min(fresh):.1f} s; "
        f"failed: {failed}"
    )
    assert not failed
    until_at_rest(system)
