"""`mesh up` with workers too small for the model: they carry it together, as one would.

`MESH_SPLIT_PROMPTS=50` compares as many texts as the issue asks for.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from mesh_process import MeshUp, clean_environment, mesh_command

from loadtests.stack import smollm2, smollm2_f32, smollm2_q4_0
from worker.model_bytes import FileBytes

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

PROMPTS = int(os.environ.get("MESH_SPLIT_PROMPTS", "6"))
TOKENS = 24
SIZES = {2: "60MB", 3: "45MB"}
_STAGE = re.compile(r"\.(\d+)-(\d+)(h?)\.[0-9a-f]{16}\.gguf$")


def prompts() -> list[str]:
    things = ("the sea", "a violin", "bread", "a late train", "winter", "the number seven", "tea")
    return [f"Write sentence {number} about {things[number % 7]}." for number in range(PROMPTS)]


def body(prompt: str, tokens: int = TOKENS, **more: object) -> dict[str, object]:
    return {
        "model": MeshUp.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
    } | more


def text_of(system: MeshUp, prompt: str, tokens: int = TOKENS) -> str:
    answer = httpx.post(
        f"{system.base_url}/chat/completions", json=body(prompt, tokens), timeout=120
    )
    assert answer.status_code == 200, answer.text + system.story()
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def alone(mesh_system: MeshUp) -> list[str]:
    """What one worker answers that holds the whole model."""
    return [text_of(mesh_system, prompt) for prompt in prompts()]


def brought_up(folder: Path, workers: int) -> MeshUp:
    return MeshUp(
        folder,
        *("--workers", str(workers), "--threads", "1"),
        settings={"MESH_MEMORY": SIZES[workers], "MESH_CACHE_DIR": str(folder / "cache")},
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, marks=pytest.mark.slow), 3],
    ids=lambda n: f"{n}-workers",
)
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MeshUp]:
    system = brought_up(tmp_path_factory.mktemp("split"), request.param)
    try:
        yield system.until_ready()
        assert system.end() == 0, system.story()
        assert system.left() == []
    finally:
        system.clear_away()


def resident(pid: int) -> dict[str, int]:
    """Bytes of each mapped file of stages that are in memory."""
    found: dict[str, int] = {}
    for mapping in psutil.Process(pid).memory_maps(grouped=True):
        if match := _STAGE.search(mapping.path):
            # Of a page that is mapped twice, each mapping has half (the embedding is, in the head).
            found[match.group(0)] = found.get(match.group(0), 0) + mapping.pss
    return found


def test_each_worker_has_its_own_layers_and_no_others(split: MeshUp) -> None:
    """What is read and what is resident is the part's own, on disk and in memory."""
    model = FileBytes(smollm2())
    (header,) = model.headers()
    whole = sum(tensor.size for tensor in header.tensors)
    engines = {name: pid for name, pid in split.pids.items() if name.startswith("engine of")}
    files = list((split.data_dir.parent / "cache" / "stages").glob("*.gguf"))
    ranges = sorted(
        (int(match[1]), int(match[2]) + 1, match[3])
        for path in files
        if (match := _STAGE.search(path.name))
    )
    assert len(files) == len(ranges) == len(engines) == len(set(engines.values()))
    assert ranges[0][0] == 0
    assert ranges[-1][1:] == (30, "h")
    assert [end for _, end, _ in ranges[:-1]] == [start for start, _, _ in ranges[1:]]
    # A stage without the head has 32 rows of zeros in the place of an embedding.
    assert whole <= sum(path.stat().st_size for path in files) < 1.03 * whole
    sizes = {
        match.group(0): path.stat().st_size for path in files if (match := _STAGE.search(path.name))
    }
    mapped = [one for pid in engines.values() for one in resident(pid).items()]
    assert sorted(name for name, _ in mapped) == sorted(sizes)
    for name, pss in mapped:
        assert 0.8 * sizes[name] <= pss <= sizes[name] + 2**20, (name, pss, sizes[name])


def test_it_answers_as_one_worker_does(split: MeshUp, alone: list[str]) -> None:
    got = [text_of(split, prompt) for prompt in prompts()]
    assert all(got)
    equal = sum(a == b for a, b in zip(got, alone, strict=True))
    print(f"{equal} of {len(got)} texts are equal to one worker's")
    # Activations travel with 16 bits, and steps are narrower: a near tie may fall otherwise.
    assert equal >= 0.8 * len(got)


def test_status_shows_who_has_what(split: MeshUp) -> None:
    done = subprocess.run(
        mesh_command("status", "--json", "--data-dir", str(split.data_dir)),
        capture_output=True,
        env=clean_environment(),
        timeout=60,
        check=True,
    )
    told = json.loads(done.stdout)
    stages = [stage for worker in told["workers"] for stage in worker["stages"]]
    assert {stage["state"] for stage in stages} == {"ready"}
    assert sum(stage["stop"] - stage["start"] for stage in stages) == 30


class Stream:
    """A streamed answer and the times of its pieces."""

    def __init__(self) -> None:
        self.text = ""
        self.times: list[float] = []
        self.done = False
        self.timings: dict[str, object] = {}

    def take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: {"):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            self.timings = chunk.get("timings") or self.timings
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    self.text += piece
                    self.times.append(time.monotonic())

    @property
    def longest_pause(self) -> float:
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("engine of a stage", marks=pytest.mark.slow),
        pytest.param("worker of a stage", marks=pytest.mark.slow),
        "engine of the head",
    ],
)
def test_an_answer_outlives_a_part(
    tmp_path: Path, alone: list[str], victim: str, mesh_system: MeshUp
) -> None:
    """The group ends, another is formed, and the answer goes on where it was."""
    prompt = prompts()[0]
    system = brought_up(tmp_path, 2)
    try:
        system.until_ready()
        undisturbed = text_of(system, prompt, 60)
        pids = system.pids
        log = system.story()
        head = re.findall(r"(worker-\d) serves", system.text)[0]
        other = "worker-2" if head == "worker-1" else "worker-1"
        chosen = {
            "engine of a stage": f"engine of {other}",
            "worker of a stage": other,
            "engine of the head": f"engine of {head}",
        }[victim]
        stream = Stream()
        with httpx.stream(
            "POST",
            f"{system.base_url}/chat/completions",
            json=body(prompt, 60, stream=True, stream_options={"include_usage": True}),
            timeout=120,
        ) as response:
            killed = False
            for line in response.iter_lines():
                stream.take(line)
                if len(stream.times) > 5 and not killed:
                    os.kill(pids[chosen], signal.SIGKILL)
                    killed = True
        assert killed, log
        assert stream.done, system.story()
        assert stream.text == undisturbed, system.story()
        # What is loaded is not loaded again. A worker that was killed loads its stage once more,
        # and may rejoin with that if the first group that it is in falls apart.
        story = system.story()
        assert story.count("stage.begins") == (1 if victim == "engine of the head" else 2), story
        if victim != "worker of a stage":
            assert ("stage.rejoins" in story) == (victim == "engine of the head"), story
            assert ("head.rejoins" in story) == (victim == "engine of a stage"), story
        print(f"{victim}: longest pause {stream.longest_pause:.1f} s")
        assert system.end() == 0, system.story()
        assert system.left() == []
    finally:
        system.clear_away()


@pytest.mark.slow
def test_the_head_has_a_draft_model_where_it_has_the_room(tmp_path: Path) -> None:
    """A smaller relative lies beside the model; the workers hold half of the model each."""
    model = smollm2_f32(tmp_path / "models")
    draft = smollm2_q4_0(tmp_path / "models")
    system = MeshUp(
        tmp_path,
        *("--workers", "2", "--threads", "1", "--slots", "1", "--ctx", "1024"),
        *("--model", str(model)),
        settings={"MESH_MEMORY": "520MB", "MESH_CACHE_DIR": str(tmp_path / "cache")},
    )
    try:
        system.until_ready()
        answer = httpx.post(
            f"{system.base_url}/chat/completions",
            json=body("Write a Python function that adds two numbers.", 64, model=model.stem),
            timeout=120,
        ).json()
        story = system.story()
        assert "draft.chosen" in story, story
        assert draft.name in story
        assert answer["timings"]["draft_n"] > answer["timings"]["draft_n_accepted"] / 2 > 0
        assert system.end() == 0, system.story()
    finally:
        system.clear_away()


def test_workers_that_are_too_small_together_say_so(tmp_path: Path) -> None:
    system = MeshUp(tmp_path, "--workers", "2", "--threads", "1", settings={"MESH_MEMORY": "30MB"})
    try:
        assert system.process.wait(90) == 1
        (line,) = [one for one in system.errors.read_text().splitlines() if one]
        assert "no host holds it alone" in line
        assert "Traceback" not in system.story()
    finally:
        system.clear_away()
