"""Which of the files at hand might draft for a model. Pure; the engine then compares vocabularies.

A draft pays if it is cheap and often right. Cheap is its share of the target's bytes, since reading
weights is what a step with few rows costs. How often it is right is unknown before it has run, so
its kinship with the target stands for that.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from worker.gguf_header import GgufError, Header, read_header

__all__ = ("PADDING", "expected_gain", "find_draft", "may_draft", "read_candidates")

PADDING = 128
"""Entries by which two vocabularies may differ at their end: model makers round the vocabulary up,
the larger models of a family to larger multiples (llama.cpp allows as many)."""

LEAST_GAIN = 1.1
"""Expected gain below which a draft is not worth its memory."""

LONGEST = 8
"""Draft tokens in one step that the estimate considers at most."""

_SAME_MODEL, _SAME_FAMILY, _SAME_ARCHITECTURE = 0.95, 0.75, 0.6
"""Tokens in which an unquantized draft of each kinship is guessed to agree with its target."""


def may_draft(target: Header, draft: Header) -> bool:
    """Whether `draft` is another, much smaller model that seems to speak the target's tokens."""
    return (
        draft.path != target.path
        and draft.causal
        and not (draft.recurrent or target.recurrent)
        and 0 < 2 * draft.tensor_bytes <= target.tensor_bytes
        and _family(draft) == _family(target)
        and (draft.tokenizer, draft.pre_tokenizer) == (target.tokenizer, target.pre_tokenizer)
        and draft.special_tokens == target.special_tokens
        and min(draft.vocabulary, target.vocabulary) > 0
        and abs(draft.vocabulary - target.vocabulary) <= PADDING
    )


def expected_gain(target: Header, draft: Header) -> float:
    """Tokens/s with the draft over tokens/s without, at the best length up to `LONGEST`.

    Where each draft token is accepted with probability `a` and costs `c` target steps, `k` of them
    yield (1 - a^(k+1)) / (1 - a) tokens for 1 + k c steps (Leviathan et al. 2023, section 3).
    """
    accepted = _acceptance(target, draft)
    cost = draft.tensor_bytes / max(1, target.tensor_bytes)
    return max(
        (1 - accepted ** (k + 1)) / (1 - accepted) / (1 + k * cost) for k in range(1, LONGEST + 1)
    )


def find_draft(target: Header, others: Sequence[Header]) -> Header | None:
    """The one of `others` that promises most as a draft for `target`; None: none promises enough.

    Most is the largest `expected_gain`; among equals the smaller file, then the first by path.
    """
    fit = [other for other in others if may_draft(target, other)]
    best = min(
        fit,
        key=lambda other: (-expected_gain(target, other), other.tensor_bytes, other.path),
        default=None,
    )
    return best if best is not None and expected_gain(target, best) >= LEAST_GAIN else None


def read_candidates(paths: Sequence[Path], most_bytes: int) -> tuple[Header, ...]:
    """Headers of those files that are no larger than `most_bytes`, without those that are broken.

    A file that is served itself is complained about then; nobody asked for it here.
    """
    found: list[Header] = []
    for path in paths:
        try:
            stat = path.stat()
            if stat.st_size <= most_bytes:
                found.append(_header(path, stat.st_size, stat.st_mtime_ns))
        except (OSError, GgufError):
            continue
    return tuple(found)


@lru_cache(maxsize=256)
def _header(path: Path, size: int, modified: int) -> Header:
    """Every model of a worker looks through the same files, and a header takes some 50 ms."""
    return read_header(path)


def _family(header: Header) -> str:
    # A mixture of experts is of the same family as the dense models beside it: qwen3moe, qwen3.
    return header.architecture.removesuffix("moe")


def _acceptance(target: Header, draft: Header) -> float:
    if _shape(draft) == _shape(target):
        kinship = _SAME_MODEL
    elif target.basename and draft.basename.lower() == target.basename.lower():
        kinship = _SAME_FAMILY
    else:
        kinship = _SAME_ARCHITECTURE
    # 4.5 bits keep 0.91 of it and 2.6 bits 0.67: SmolLM2 against its Q4_0 agrees in 0.65 (prose)
    # to 0.92 (code) of the tokens.
    bits = 8 * draft.tensor_bytes / max(1, draft.parameters)
    return kinship * max(0.0, 1 - 2 ** (1 - bits))


def _shape(header: Header) -> tuple[object, ...]:
    return (
        header.architecture,
        header.name.lower(),
        header.block_count,
        header.embedding_length,
        header.feed_forward_length,
        header.head_counts_kv,
        header.experts,
    )
