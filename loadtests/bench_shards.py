"""What shards of experts are worth: texts that are equal, and perplexity by the experts kept.

SmolLM2 with its feed-forward layers made into 8 experts each, of which 2 answer a token. First all
alike: then every shard must write what the dense model writes. Then with noise: then it matters
which experts a shard keeps, and the table shows perplexity over one half of a text with the most
used ones by the gate mass of the other half, beside as many taken at random.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import cyclopts
import msgspec
import uvloop

from loadtests.engine_driver import EngineDriver
from loadtests.figures import markdown
from loadtests.rings import asked
from loadtests.speculation_corpora import CORPORA, prompts
from loadtests.stack import smollm2_f32
from loadtests.upcycled import EXPERTS, USED, upcycle
from shared.protocol import Delta
from shared.shard_analysis import Analysis
from worker.cut_file import make_file
from worker.engine.llama import Model, silence
from worker.engine.text_score import Score, score
from worker.model_bytes import FileBytes
from worker.shard_cut import cut_shard
from worker.shards import build
from worker.stage_cut import ends_at

CONTEXT = 512

app = cyclopts.App(help=__doc__, version_flags=[])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def scored(path: Path, text: str, pieces: int) -> Score:
    """Perplexity and gate mass over a text."""
    model = Model(str(path))
    try:
        tokens = model.tokenize(text, add_special=False, parse_special=False)
        return score(model, tokens, context=CONTEXT, most=pieces, threads=2)
    finally:
        model.close()


def keep(model: Path, folder: Path, name: str, kept: Sequence[tuple[int, ...]]) -> Path:
    """A model with some of the experts of each layer."""
    source = FileBytes(model)
    parts = source.headers()
    plan = cut_shard(parts, source.values(ends_at(parts[0])), kept, identity=source.identity)
    return make_file(source, plan, folder, name, progress=lambda *_: None).path


async def texts(path: Path, questions: Sequence[str], tokens: int) -> list[str]:
    """Greedy answers of an engine, one after the other."""
    engine = EngineDriver(str(path), slots=1, context=1024, threads=2, speculation="off")
    await engine.start()
    try:
        found = []
        for question in questions:
            pieces = [
                frame.text
                async for frame in engine.submit(asked(question, tokens))
                if isinstance(frame, Delta)
            ]
            found.append("".join(pieces))
        return found
    finally:
        await engine.stop()


def shards_of(model: Path, folder: Path, found: Score, options: dict[str, int]) -> list[Path]:
    """Build shards by an analysis."""
    analysis = Analysis(
        model=model.stem,
        size=model.stat().st_size,
        text="bench",
        context=CONTEXT,
        tokens=found.tokens,
        counted=found.counted,
        perplexity=found.perplexity,
        error=found.error,
        masses=found.masses,
    )
    told = folder / f"{model.stem}.json"
    told.write_bytes(msgspec.json.encode(analysis))
    made = build(model, told, folder, tell=lambda *_: None, **options)
    return [Path(one.path) for one in made]


def alike(dense: Path, folder: Path, text: str, count: int, tokens: int) -> str:
    """Compare the shards of experts that are all alike with the dense model."""
    questions = [p.messages[-1].content for corpus in CORPORA[:2] for p in prompts(corpus, 12)]
    questions = questions[:count]
    half = upcycle(dense, folder / "dense.gguf", noise=0.0, experts=0)
    model = upcycle(dense, folder / "alike.gguf", noise=0.0)
    wanted = uvloop.run(texts(half, questions, tokens))
    rows = []
    options = {"shards": 3, "core": 2, "overlap": 1}
    for path in [model, *shards_of(model, folder, scored(model, text, 1), options)]:
        got = uvloop.run(texts(path, questions, tokens))
        equal = sum(a == b for a, b in zip(wanted, got, strict=True))
        rows.append((path.name.partition(".gguf")[0][:24], f"{equal} of {len(wanted)}"))
        _say(f"{rows[-1]}")
    return markdown(("experts alike", "texts equal to the dense model's"), rows)


def noisy(dense: Path, folder: Path, text: str, pieces: int, noise: float, seeds: int) -> str:
    """Perplexity by how many experts are kept, and which."""
    model = upcycle(dense, folder / "noisy.gguf", noise=noise)
    masses = scored(model, text[: len(text) // 2], pieces).masses
    text = text[len(text) // 2 :]
    whole = scored(model, text, pieces)
    _say(f"whole: perplexity {whole.perplexity:.3f} +- {whole.error:.3f}")
    rows = []
    for kept in range(EXPERTS - 1, USED - 1, -1):
        by_mass = [
            tuple(sorted(sorted(range(EXPERTS), key=lambda e: -layer[e])[:kept]))
            for layer in masses
        ]
        mass = sum(
            sum(layer[e] for e in mine) for layer, mine in zip(masses, by_mass, strict=True)
        ) / len(by_mass)
        path = keep(model, folder, f"best-{kept}", by_mass)
        best = scored(path, text, pieces)
        path.unlink()
        at_random = []
        for seed in range(seeds):
            draw = random.Random(seed)
            chosen = [tuple(sorted(draw.sample(range(EXPERTS), kept))) for _ in masses]
            path = keep(model, folder, f"random-{kept}", chosen)
            at_random.append(scored(path, text, pieces).perplexity)
            path.unlink()
        rows.append(
            (
                f"{kept} of {EXPERTS}",
                f"{mass:.2f}",
                f"{best.perplexity:.2f}",
                f"{best.perplexity / whole.perplexity:.3f}",
                f"{sum(at_random) / len(at_random):.2f}",
                f"{sum(at_random) / len(at_random) / whole.perplexity:.3f}",
            )
        )
        _say(f"{rows[-1]}")
    rows.insert(0, (f"{EXPERTS} of {EXPERTS}", "1.00", f"{whole.perplexity:.2f}", "1", "", ""))
    head = ("kept", "gate mass", "perplexity, by mass", "of the whole", "at random", "of the whole")
    return markdown(head, rows)


@app.default
def main(
    *,
    text: Path = Path("docs/failing.md"),
    noise: float = 0.3,
    pieces: int = 6,
    seeds: int = 2,
    count: int = 12,
    tokens: int = 32,
) -> None:
    """Print both tables.

    Args:
        text: what perplexity and gate mass are measured over
        noise: what is added to each expert's weights, as a part of their own standard deviation
        pieces: of 512 tokens of the text
        seeds: random choices of experts
        count: prompts whose texts are compared, at most 24
        tokens: of each text
    """
    silence()
    words = text.read_text("utf-8")
    with TemporaryDirectory(prefix="mesh-shards-") as name:
        folder = Path(name)
        dense = smollm2_f32(folder)
        print(alike(dense, folder, words, count, tokens))
        print()
        print(noisy(dense, folder, words, pieces, noise, seeds))


if __name__ == "__main__":
    app()
