"""`python -m worker.shards MODEL --analysis FILE --shards N …`: writes a model's shards.

A process of its own, started by `mesh shard build`. It tells on stdout, a line each,
`progress N COUNT` in bytes of all shards together, and `done JSON` at the end, a list of `Made`.
What is wrong is one line on stderr, with exit code 2 if it was asked for wrongly and 1 if it
failed.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from shared.shard_analysis import read_analysis
from shared.sharding import ShardError, deal
from worker.cut_file import make_file
from worker.gguf_file import GgufError
from worker.model_bytes import FileBytes, SourceError
from worker.shard_cut import cut_shard
from worker.stage_cut import ends_at

__all__ = ("Made", "build", "main")


class Made(msgspec.Struct, frozen=True):
    """A shard's file."""

    path: str
    size: int
    written: bool
    """False: it was there."""


def build(
    model: Path,
    analysis: Path,
    folder: Path,
    *,
    shards: int,
    core: int,
    overlap: int,
    tell: Callable[[int, int], None],
) -> list[Made]:
    """Write all shards of a model that are not there yet.

    Raises:
        ShardError: the analysis is none, or of another model, or the numbers do not go together.
        GgufError: the model cannot be cut so.
        SourceError: it cannot be read, or the folder cannot be written.
    """
    found = read_analysis(analysis)
    source = FileBytes(model)
    parts = source.headers()
    size = sum(part.size for part in parts)
    if size != found.size:
        raise ShardError(
            f"{analysis}: of a model of {found.size} bytes; {model.name} has {size}: analyze it"
        )
    dealt = deal(found.masses, shards, core=core, overlap=overlap)
    values = source.values(ends_at(parts[0]))
    plans = [cut_shard(parts, values, shard.experts, identity=source.identity) for shard in dealt]
    total = sum(plan.size for plan in plans)
    made: list[Made] = []
    before = 0
    for number, plan in enumerate(plans, 1):
        name = f"{source.name}.shard-{number}-of-{shards}"
        progress = partial(_tell, tell, before, total)
        one = make_file(source, plan, folder, name, progress=progress)
        before += plan.size
        made.append(Made(str(one.path), plan.size, bool(one.fetched)))
    return made


def _tell(tell: Callable[[int, int], None], before: int, total: int, done: int, of: int) -> None:
    tell(before + done, total)


def main() -> None:
    """Write the shards."""
    parser = argparse.ArgumentParser(prog="worker.shards")
    parser.add_argument("model", type=Path)
    parser.add_argument("--analysis", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("shards", "core", "overlap"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done * 200 // total > told or done == total:
            told = done * 200 // total
            sys.stdout.write(f"progress {done} {total}\n")
            sys.stdout.flush()

    try:
        made = build(
            asked.model,
            asked.analysis,
            asked.out,
            shards=asked.shards,
            core=asked.core,
            overlap=asked.overlap,
            tell=tell,
        )
    except (ShardError, GgufError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except SourceError as error:
        sys.exit(str(error))
    sys.stdout.write(f"done {msgspec.json.encode(made).decode()}\n")


if __name__ == "__main__":
    main()
