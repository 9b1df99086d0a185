"""Stages give the whole model's logits: of all that may be split, and of the real one."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TINY, write_tiny

from loadtests.stack import smollm2
from shared.planning import SPLITTABLE
from worker.cut_file import make_stage
from worker.engine.batch import Batch
from worker.engine.llama import Context, Model, silence
from worker.engine.stage import Rows, Stage, input_scale
from worker.engine.token_rows import TokenRows
from worker.gguf_file import read_files
from worker.model_bytes import FileBytes
from worker.shape import read_shape
from worker.stage_cut import Wanted

pytestmark = pytest.mark.model

SLOTS, CONTEXT, STEP = 3, 128, 64
PROMPT, ANSWER = 12, 6

TOLERANCE = 1e-5
"""Of logits of about 1. On x86-64 no bit differs; a backend that joins operations of neighbouring
layers might differ in the last ones."""


@pytest.fixture(autouse=True, scope="module")
def _backend() -> None:
    silence()


class Ring:
    """Stages in a row in one process, each of a file of its own."""

    def __init__(self, path: Path, cuts: Sequence[int], folder: Path, owner: ExitStack) -> None:
        ends = (0, *cuts, len(read_shape(path).layers))
        self.stages: list[Stage] = []
        for start, stop in pairwise(ends):
            head = stop == ends[-1]
            wanted = Wanted(start, stop, head=head)
            made = make_stage(FileBytes(path), wanted, folder, progress=lambda *_: None)
            model = Model(str(made.path))
            owner.callback(model.close)
            architecture = str(read_files(made.path)[0].values["general.architecture"])
            stage = Stage(
                model,
                head=head,
                scale=input_scale(architecture, model.embedding_size),
                slots=SLOTS,
                context=CONTEXT,
                step_tokens=STEP,
                threads=1,
            )
            owner.callback(stage.close)
            self.stages.append(stage)
            self.embed = TokenRows(made.path)

    def __call__(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> Rows:
        rows = self.embed(tokens)
        for stage in self.stages:
            rows = stage.run(rows, slots, positions)
        return rows


class Whole:
    """The whole model, asked for all logits in the same way."""

    def __init__(self, path: Path, owner: ExitStack) -> None:
        model = Model(str(path))
        owner.callback(model.close)
        self.context = Context(
            model, slots=SLOTS, context=CONTEXT, step_tokens=STEP, threads=1, prefill_threads=1
        )
        owner.callback(self.context.close)
        self.batch = Batch(STEP)
        self.vocabulary = model.vocab_size

    def __call__(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> Rows:
        count = len(tokens)
        self.batch.token[:count] = tokens
        self.batch.slot[:count] = slots
        self.batch.position[:count] = positions
        self.batch.output[:count] = 1
        assert self.context.decode(self.batch, count) == 0
        return self.context.logits(count).copy()


@pytest.fixture
def owner() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def greatest_difference(whole: Any, ring: Any, vocabulary: int) -> float:
    """Of logits over a prompt and some tokens after it, for several sequences at once."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, vocabulary, (SLOTS, PROMPT))
    slots = np.repeat(np.arange(SLOTS), PROMPT)
    positions = np.tile(np.arange(PROMPT), SLOTS)
    logits = whole(tokens.ravel(), slots, positions)
    most = float(np.abs(logits - ring(tokens.ravel(), slots, positions)).max())
    last = logits.reshape(SLOTS, PROMPT, -1)[:, -1]
    for step in range(ANSWER):
        following = last.argmax(1)
        places = [PROMPT + step] * SLOTS
        last = whole(following, range(SLOTS), places)
        most = max(most, float(np.abs(last - ring(following, range(SLOTS), places)).max()))
    return most


@pytest.mark.parametrize("name", TINY)
def test_the_stages_of_an_architecture_give_its_logits(name: str, tmp_path: Path, owner: ExitStack):
    path = write_tiny(tmp_path / f"{name}.gguf", TINY[name])
    third = TINY[name].layers // 3
    ring = Ring(path, (third, 2 * third), tmp_path / "stages", owner)
    whole = Whole(path, owner)
    most = greatest_difference(whole, ring, whole.vocabulary)
    print(f"{name}: greatest difference of a logit {most:.1e}")
    assert most < TOLERANCE


def test_every_architecture_that_may_be_split_is_shown():
    assert {tiny.architecture for tiny in TINY.values()} == SPLITTABLE


def test_a_wrong_cut_is_told_apart(tmp_path: Path, owner: ExitStack):
    """The comparison finds what is wrong: Gemma 2 cut in the middle of its pattern of windows."""
    path = write_tiny(tmp_path / "gemma2.gguf", TINY["gemma2"])
    whole = Whole(path, owner)
    ring = Ring(path, (3,), tmp_path / "stages", owner)
    assert greatest_difference(whole, ring, whole.vocabulary) > 1000 * TOLERANCE


def test_the_stages_of_the_real_model_give_its_logits(tmp_path: Path, owner: ExitStack):
    path = Path(smollm2())
    ring = Ring(path, (11, 22), tmp_path / "stages", owner)
    whole = Whole(path, owner)
    most = greatest_difference(whole, ring, whole.vocabulary)
    print(f"SmolLM2 Q4_1: greatest difference of a logit {most:.1e}")
    assert most < 1e-3


def test_rows_in_another_order_are_refused(tmp_path: Path, owner: ExitStack):
    path = write_tiny(tmp_path / "m.gguf", TINY["llama"])
    ring = Ring(path, (3,), tmp_path / "stages", owner)
    with pytest.raises(ValueError, match="one after the other"):
        ring([1, 2, 3], [0, 1, 0], [0, 0, 1])
    with pytest.raises(ValueError, match="as many of each"):
        ring([1, 2, 3], [0, 0, 1], [0, 1, 0])
    with pytest.raises(ValueError, match="consecutive slots"):
        ring([1, 2], [0, 2], [0, 0])
    with pytest.raises(ValueError, match="a step has 1 to"):
        ring([1] * (STEP + 1), [0] * (STEP + 1), range(STEP + 1))
