"""`python -m worker.engine.analyze MODEL --text FILE`: perplexity, and gate mass of experts.

A process of its own, started by `mesh shard`. It tells on stdout, a line each, `progress N COUNT`
before every piece of the text and `done JSON` at the end, a `Found`. What is wrong is one line on
stderr, with exit code 2 if it was asked for wrongly and 1 if it failed.
"""

import argparse
import os
import sys
from pathlib import Path

import msgspec

from worker.engine.llama import LoadError, Model, silence
from worker.engine.text_score import Score, ScoreError, score
from worker.gguf_header import GgufError, read_header

__all__ = ("Found", "main")


class Found(msgspec.Struct, frozen=True):
    """What is told at the end."""

    size: int
    """Bytes of the model, all parts."""
    score: Score


def main() -> None:
    """Score the text."""
    parser = argparse.ArgumentParser(prog="worker.engine.analyze")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--pieces", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    silence()
    try:
        header = read_header(asked.model)
        text = asked.text.read_text("utf-8", errors="replace")
        model = Model(str(asked.model))
        tokens = model.tokenize(text, add_special=model.adds_bos, parse_special=False)
        found = score(
            model,
            tokens,
            context=asked.ctx,
            most=asked.pieces,
            threads=asked.threads or len(os.sched_getaffinity(0)),
            tell=lambda done, of: _say(f"progress {done} {of}"),
        )
    except (ScoreError, GgufError, OSError) as error:
        _end(error, 2)
    except (LoadError, RuntimeError) as error:
        _end(error, 1)
    _say(f"done {msgspec.json.encode(Found(header.size, found)).decode()}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _end(error: Exception, code: int) -> None:
    sys.stderr.write(f"{' '.join(str(error).split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
