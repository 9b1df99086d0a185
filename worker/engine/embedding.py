"""Embeddings: mean of the last hidden states, unit length, in slices beside decoding.

A context of its own, made at the first request. A causal model's input is computed in chunks, so
that a long text does not stall the streams; a bidirectional one needs its input whole. Models whose
header names another pooling get that one.
"""

import time

import numpy as np
from numpy.typing import NDArray

from shared.protocol import Embed, EmbedResult, Usage
from worker.engine.batch import Batch
from worker.engine.fair_queue import FairQueue
from worker.engine.llama import Context, Model
from worker.link import EngineConfig

__all__ = ("EmbedJob", "Embedder")

_POOLING = {"1": "mean", "2": "first", "3": "last"}
"""`<architecture>.pooling_type` of GGUF: llama.cpp's `enum llama_pooling_type`."""


class EmbedJob:
    """One embeddings request and how far it is."""

    def __init__(
        self, request: Embed, reply: str, received: float, inputs: list[list[int]]
    ) -> None:
        self.request = request
        self.attempt = request.attempt
        self.reply = reply
        self.received = received
        self.inputs = inputs
        self.vectors: list[bytes] = []
        self.position = 0
        self.sum: NDArray[np.float64] | None = None

    def result(self) -> EmbedResult:
        """The last frame."""
        tokens = sum(map(len, self.inputs))
        return EmbedResult(self.attempt, tuple(self.vectors), Usage(prompt=tokens, completion=0))


class Embedder:
    """Works off embedding jobs a chunk at a time."""

    def __init__(self, model: Model, config: EngineConfig, context: int, threads: int) -> None:
        self._model = model
        self._tokens = context
        self._step = config.step_tokens
        self._threads = threads
        architecture = model.metadata("general.architecture") or ""
        pooling = model.metadata(f"{architecture}.pooling_type") or ""
        self._pooling = _POOLING.get(pooling, "mean")
        self.bidirectional = model.metadata(f"{architecture}.attention.causal") == "false"
        self._context: Context | None = None
        self._batch: Batch | None = None
        self._current: EmbedJob | None = None
        self._waiting: FairQueue[EmbedJob] = FairQueue()

    def __len__(self) -> int:
        return len(self._waiting) + (self._current is not None)

    def add(self, job: EmbedJob) -> None:
        """Let a job wait for its turn."""
        self._waiting.push(
            job,
            owner=job.request.owner,
            cost=sum(map(len, job.inputs)),
            batch=job.request.priority == "batch",
            now=time.monotonic(),
        )

    def remove(self, job: EmbedJob) -> None:
        """Nobody wants it any more."""
        if self._current is job:
            self._current = None
        else:
            self._waiting.remove(lambda waiting: waiting is job)

    def begin_next(self) -> EmbedJob | None:
        """Make the next job the one that `step` works on, unless it has one."""
        if self._current is not None or not self._waiting:
            return None
        self._current = self._waiting.pop(time.monotonic())
        return self._current

    def step(self, budget: int) -> EmbedJob | None:
        """Compute at most `budget` tokens (a bidirectional input whole); the job if it is complete.

        Raises:
            RuntimeError: llama.cpp failed, or no job was begun.
        """
        job = self._current
        if job is None:
            raise RuntimeError("no embedding to compute")
        context, batch = self._ready()
        tokens = job.inputs[len(job.vectors)]
        if job.position == 0:
            context.forget(0)
        most = len(tokens) if self.bidirectional else min(budget, self._step)
        part = tokens[job.position : job.position + most]
        rows = len(part)
        batch.token[:rows] = part
        batch.position[:rows] = np.arange(job.position, job.position + rows)
        batch.slot[:rows] = 0
        batch.output[:rows] = 1
        code = context.decode(batch, rows)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for an embedding")
        self._pool(job, context.embeddings(rows))
        job.position += rows
        if job.position < len(tokens):
            return None
        self._finish_input(job, len(tokens))
        if len(job.vectors) < len(job.inputs):
            return None
        self._current = None
        return job

    def _ready(self) -> tuple[Context, Batch]:
        if self._context is None or self._batch is None:
            self._context = Context(
                self._model,
                slots=1,
                context=self._tokens,
                step_tokens=self._step,
                threads=self._threads,
                prefill_threads=self._threads,
                embeddings=True,
                whole_inputs=self.bidirectional,
            )
            self._batch = Batch(self._tokens if self.bidirectional else self._step)
        return self._context, self._batch

    def _pool(self, job: EmbedJob, states: NDArray[np.float32]) -> None:
        if self._pooling == "mean":
            part = states.sum(axis=0, dtype=np.float64)
            job.sum = part if job.sum is None else job.sum + part
        elif self._pooling == "last" or job.sum is None:
            job.sum = states[-1 if self._pooling == "last" else 0].astype(np.float64)

    def _finish_input(self, job: EmbedJob, count: int) -> None:
        if job.sum is None:
            raise RuntimeError("an embedding without states")
        vector = job.sum / count if self._pooling == "mean" else job.sum
        vector = vector[: job.request.dimensions]
        norm = float(np.linalg.norm(vector))
        job.vectors.append((vector / (norm or 1.0)).astype("<f4").tobytes())
        job.position, job.sum = 0, None
