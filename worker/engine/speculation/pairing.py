"""Whether a draft model speaks its target's tokens: what one means by a number, so must the other.

Drafts travel between the two as token ids alone, and text is tokenized by the target only. So each
token that both have must stand for the same bytes and be of the same kind, and the tokens that
begin and end a generation must be the same; how text is cut into tokens need not be.

Allowed are up to `PADDING` more entries at the end of one vocabulary, all of them marked as unused:
makers of models round the vocabulary up, and the larger models of a family to larger multiples.
Neither model is trained on them, so no token with such a number comes up; who drafts cuts the
draft's logits to the smaller vocabulary all the same.
"""

import llama_cpp.llama_cpp as ll

from worker.drafts import PADDING
from worker.engine.llama import Model

__all__ = ("Unpaired", "check_pair")

_KINDS = {
    ll.LLAMA_TOKEN_ATTR_UNKNOWN: "unknown",
    ll.LLAMA_TOKEN_ATTR_UNUSED: "unused",
    ll.LLAMA_TOKEN_ATTR_CONTROL: "control",
    ll.LLAMA_TOKEN_ATTR_BYTE: "byte",
}
"""The attributes that count. The others (normal, user-defined, normalized, and what spaces beside
the token are stripped) are for cutting text into tokens, and differ between converters."""
_KIND_MASK = sum(_KINDS)


class Unpaired(Exception):
    """A draft cannot draft for a target; the message names the first difference in one line."""


def check_pair(target: Model, draft: Model) -> None:
    """Compare two loaded models, vocabularies alone being enough (`vocab_only`).

    Takes about 2 us for every token of both vocabularies.

    Raises:
        Unpaired: they do not fit, with the first difference in this order: memory that cannot be
            cut, tokenizers, sizes, tokens by their number, special tokens, ends of a generation.
    """
    for model, role in ((target, "target"), (draft, "draft")):
        if ll.llama_model_is_recurrent(model.handle) or ll.llama_model_is_hybrid(model.handle):
            raise Unpaired(f"the {role} is recurrent: its state cannot go back behind a token")
    kinds = tuple(int(ll.llama_vocab_type(model.vocab)) for model in (target, draft))
    if kinds[0] != kinds[1]:
        raise Unpaired(f"the target's tokenizer is of type {kinds[0]}, the draft's of {kinds[1]}")
    _check_sizes(target, draft)
    _check_tokens(target, draft)
    for name, read in (
        ("bos", ll.llama_vocab_bos),
        ("eos", ll.llama_vocab_eos),
        ("eot", ll.llama_vocab_eot),
    ):
        ours, theirs = int(read(target.vocab)), int(read(draft.vocab))
        if ours != theirs:
            raise Unpaired(f"{name} is {_id(ours)} of the target, {_id(theirs)} of the draft")
    only = target.end_tokens ^ draft.end_tokens
    if only:
        first = min(only)
        role = "target" if first in target.end_tokens else "draft"
        raise Unpaired(f"token {first} ends a generation of the {role} alone")


def _check_sizes(target: Model, draft: Model) -> None:
    sizes = (target.vocab_size, draft.vocab_size)
    told = f"the target has {sizes[0]} tokens, the draft {sizes[1]}"
    if abs(sizes[0] - sizes[1]) > PADDING:
        raise Unpaired(f"{told}: more than {PADDING} apart")
    larger = target if sizes[0] > sizes[1] else draft
    for token in range(min(sizes), max(sizes)):
        if not _kind(larger, token) & ll.LLAMA_TOKEN_ATTR_UNUSED:
            raise Unpaired(f"{told}: token {token} is no padding")


def _check_tokens(target: Model, draft: Model) -> None:
    pairs = zip(target.pieces(special=True), draft.pieces(special=True), strict=False)
    for token, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            raise Unpaired(
                f"token {token} is {_shown(ours)} in the target, {_shown(theirs)} in the draft"
            )
        kinds = _kind(target, token), _kind(draft, token)
        if kinds[0] != kinds[1]:
            raise Unpaired(
                f"token {token} {_shown(ours)} is {_named(kinds[0])} in the target, "
                f"{_named(kinds[1])} in the draft"
            )


def _kind(model: Model, token: int) -> int:
    return int(ll.llama_vocab_get_attr(model.vocab, token)) & _KIND_MASK


def _named(kind: int) -> str:
    return " and ".join(name for bit, name in _KINDS.items() if kind & bit) or "plain"


def _shown(piece: bytes) -> str:
    return repr(piece.decode("utf-8", "backslashreplace"))


def _id(token: int) -> str:
    return f"token {token}" if token >= 0 else "no token"
