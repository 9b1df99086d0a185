"""How near to a tie a token was drawn: where two runs part, was it rounding or a fault?

llama.cpp rounds one row in another way than several, so the same token may be computed from logits
that differ in their last digits. Where two tokens were nearly equally good that decides; anywhere
else it must not.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.protocol import ChatInput, Generate, TextInput
from worker.engine.batch import Batch
from worker.engine.constraint import ConstraintCompiler
from worker.engine.draws import uniform
from worker.engine.invariant_context import make_context
from worker.engine.llama import Model, silence
from worker.engine.sampling import Sampler
from worker.engine.template import FALLBACK_TEMPLATE, ChatTemplate
from worker.engine.tiles import Tiles, ahead
from worker.engine.tools import detect_family, tool_constraint
from worker.link import BatchInvariance, EngineConfig

__all__ = ("Judge", "draw_gap")

_ROWS = 512
_LEAST_SHARE = 1e-12


def draw_gap(
    row: NDArray[np.float32], temperature: float, draw: float, one: int, other: int
) -> float:
    """Return by how much the logits must change for `other` to be drawn in place of `one`.

    `row` is biased and masked already; `draw` is in [0, 1) and of no account at temperature 0,
    where the answer is the distance of the two logits. Else the tokens share [0, 1) by their
    weights, in the order of their ids, and the draw has to cross the nearer edge of the other's
    share. Raising all logits on one side of an edge at share s by x moves it so that
    log(s / (1 - s)) changes by x / temperature: the answer is the x that moves it onto the draw.
    """
    if one == other:
        return 0.0
    if temperature == 0:
        return abs(float(row[one]) - float(row[other]))
    if row[other] == -np.inf:
        return math.inf
    weights = np.exp((row.astype(np.float64) - float(row.max())) / temperature)
    edges = np.cumsum(weights) / weights.sum()
    edge = float(edges[other - 1] if other > one else edges[other])
    return temperature * abs(_log_odds(edge) - _log_odds(draw))


def _log_odds(share: float) -> float:
    share = min(max(share, _LEAST_SHARE), 1 - _LEAST_SHARE)
    return math.log(share / (1 - share))


class Judge:
    """Computes the row of logits that a token was drawn from, as the engine does: a prompt in its
    tiles, then a row a step.

    The model is loaded into this process. Requests that cut candidates off (top_k, top_p, min_p)
    are judged as if they did not.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 1024,
        threads: int = 1,
        batch_invariant: BatchInvariance = "auto",
    ) -> None:
        silence()
        self._model = Model(str(path))
        self._context = make_context(
            self._model,
            EngineConfig(str(path), "", "", step_tokens=_ROWS, batch_invariant=batch_invariant),
            slots=1,
            context=context,
            threads=threads,
            prefill_threads=threads,
        )
        self._batch = Batch(_ROWS)
        source = self._model.metadata("tokenizer.chat_template") or FALLBACK_TEMPLATE
        self._family = detect_family(source)
        self.pieces = self._model.pieces(special=True)
        bos, eos = (
            self.pieces[token].decode() if token >= 0 else ""
            for token in (self._model.bos, self._model.eos)
        )
        self._template = ChatTemplate(source, bos=bos, eos=eos)
        self._constraints = ConstraintCompiler(self._model.vocab)

    def close(self) -> None:
        """Free the model."""
        self._context.close()
        self._model.close()

    def gap(
        self,
        request: Generate,
        before: Sequence[int],
        one: int | None,
        other: int | None,
        *,
        choice: int = 0,
    ) -> float:
        """Return `draw_gap` of the token after `before`; None stands for the end of the answer.

        Raises:
            RuntimeError: llama.cpp failed.
        """
        row = self.row(request, before)
        end = max(self._model.end_tokens, key=lambda token: float(row[token]))
        sampling = request.sampling
        draw = uniform(sampling.seed, choice, len(before))
        first, second = (end if token is None else token for token in (one, other))
        return draw_gap(row, sampling.temperature, draw, first, second)

    def row(self, request: Generate, before: Sequence[int]) -> NDArray[np.float32]:
        """Return what the token after `before` is drawn from: biased, penalized and masked.

        It is llama.cpp's own memory, valid until the next call.
        """
        prompt = self._prompt(request)
        sampler = Sampler(request.sampling, prompt, self._model.end_tokens)
        row = self._logits(prompt, before)
        for token in before:
            sampler.accept(token)
        sampler.adjust(row)
        constraint = request.constraint
        if isinstance(request.input, ChatInput) and request.input.tools:
            tools, choice = request.input.tools, request.input.tool_choice
            constraint = tool_constraint(self._family, tools, choice) or constraint
        if constraint is not None:
            matcher = self._constraints.compile(constraint)
            matcher.replay(before)
            matcher.apply(row)
        return row

    def _prompt(self, request: Generate) -> list[int]:
        source = request.input
        if isinstance(source, ChatInput):
            text = self._template.render(source)
            special = not self._bos_written(text)
        elif isinstance(source, TextInput):
            text, special = source.text, True
        else:
            return list(source.tokens)
        return self._model.tokenize(text, add_special=special, parse_special=True)

    def _bos_written(self, text: str) -> bool:
        bos = self._model.bos
        return bos >= 0 and text.startswith(self.pieces[bos].decode())

    def _logits(self, prompt: Sequence[int], before: Sequence[int]) -> NDArray[np.float32]:
        self._context.forget(0)
        tile = self._context.tile
        spans = Tiles(tile).of(prompt, self._model.end_tokens)
        done = 0
        while done < len(prompt):
            rows, wide = ahead(spans, done, len(prompt))
            # Whole tiles, or fewer rows than a tile has.
            most = _ROWS - _ROWS % (tile or 1) if wide else (tile or _ROWS + 1) - 1
            self._decode(prompt[done : done + min(rows, most)], done)
            done += min(rows, most)
        for index, token in enumerate(before):
            self._decode([token], len(prompt) + index)
        last: NDArray[np.float32] = self._context.logits(1)[0]
        return last

    def _decode(self, tokens: Sequence[int], position: int) -> None:
        rows = len(tokens)
        batch = self._batch
        batch.token[:rows] = tokens
        batch.position[:rows] = np.arange(position, position + rows)
        batch.slot[:rows] = 0
        batch.output[:rows] = 0
        batch.output[rows - 1] = 1
        code = self._context.decode(batch, rows)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
