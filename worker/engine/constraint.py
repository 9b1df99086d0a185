"""Constrained output: llguidance's matchers over the model's own vocabulary.

A matcher follows one output and says which tokens may come next. Compiled grammars are kept, so
that a schema that comes again costs a copy of its start state.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.llamacpp import lltokenizer_from_vocab
from numpy.typing import NDArray

from shared.errors import InvalidRequest, WorkerFailed
from shared.protocol import Constraint
from worker.engine.tools.grammar import WHITESPACE, bind_markers

__all__ = ("ConstraintCompiler", "Matcher")

MAX_LENGTH = 1024 * 1024
"""Most characters in a schema, regex or grammar."""
MAX_REGEX = 64 * 1024
CACHED = 64

# The worst grammars we know take 0.7 s to compile or refuse with these; 10 s with the defaults.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=200_000,
    max_lexer_states=50_000,
    max_grammar_size=20_000,
    verbose_errors=False,
)
_LABEL = {
    "json_schema": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regex",
    "lark": "grammar",
}
_DEAD_END = frozenset({"NoExtension", "NoExtensionBias"})
_TOO_COMPLEX = frozenset({"ParserTooComplex", "LexerTooComplex"})


class Matcher:
    """Follows one output; forbids what would break the constraint.

    The array that `mask` returns is the matcher's own and is overwritten by the next call.
    """

    __slots__ = ("_address", "_bits", "_current", "_mask", "_matcher", "_param")

    def __init__(self, matcher: LLMatcher, vocabulary: int, param: str) -> None:
        self._matcher = matcher
        self._param = param
        self._mask: NDArray[np.uint32] = np.zeros((vocabulary + 31) // 32, np.uint32)
        self._address = self._mask.ctypes.data
        self._current = False

    def mask(self) -> NDArray[np.uint32]:
        """The tokens that may come next, a bit each, the lowest bit first.

        Raises:
            InvalidRequest: the constraint is too complex to be followed.
            WorkerFailed: llguidance failed.
        """
        if not self._current:
            self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
            self._check()
            self._current = True
        return self._mask

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of forbidden tokens to -inf in place; raises as `mask`."""
        forbidden = ~self.mask().view(np.uint8)
        known = min(len(logits), 8 * len(forbidden))
        bits = np.unpackbits(forbidden, count=known, bitorder="little").view(np.bool_)
        logits[:known][bits] = -np.inf
        logits[known:] = -np.inf

    def accept(self, token: int) -> bool:
        """Take the token that was chosen; False if the constraint forbids it, which is final."""
        self._current = False
        return self._matcher.consume_token(token)

    def replay(self, tokens: Iterable[int]) -> bool:
        """Take the tokens that were emitted before, to go on after them; False as `accept`."""
        self._current = False
        return self._matcher.consume_tokens(list(tokens))

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may follow, in this order; nothing is taken."""
        return self._matcher.validate_tokens(list(tokens))

    @property
    def stopped(self) -> bool:
        """The output is complete: nothing but the end may follow."""
        return self._matcher.is_stopped()

    @property
    def allows_eos(self) -> bool:
        """The output may end here."""
        return self._matcher.is_accepting()

    def fork(self) -> "Matcher":
        """A matcher of its own that has followed the same output."""
        return Matcher(self._matcher.deep_copy(), 32 * len(self._mask), self._param)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason, message = self._matcher.stop_reason(), _brief(self._matcher.get_error())
            if reason in _TOO_COMPLEX:
                raise InvalidRequest(f"constraint too complex: {message}", param=self._param)
            raise WorkerFailed(f"constrained decoding failed: {message or reason}")


class ConstraintCompiler:
    """Compiles constraints for one vocabulary; `vocab_handle` is llama.cpp's `llama_vocab *`."""

    def __init__(self, vocab_handle: Any) -> None:
        size = ll.llama_vocab_n_tokens(vocab_handle)
        ends = [token for token in range(size) if ll.llama_vocab_is_eog(vocab_handle, token)]
        with warnings.catch_warnings():
            # llguidance's binding calls a function of llama.cpp by its former name.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._tokenizer: LLTokenizer = lltokenizer_from_vocab(
                vocab_handle, eos_token=ends or None
            )
        # llguidance knows user-defined tokens in angle brackets as special too.
        self._special = {
            self._tokenizer.decode_str([token]): token
            for token in range(size)
            if self._tokenizer.is_special_token(token)
        }
        self._cache: OrderedDict[Constraint, Matcher] = OrderedDict()

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of an output.

        Raises:
            InvalidRequest: no output can match, or llguidance cannot express the constraint.
        """
        matcher = self._cache.get(constraint)
        if matcher is None:
            matcher = self._compile(constraint)
            self._cache[constraint] = matcher
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(constraint)
        return matcher.fork()

    def __contains__(self, constraint: Constraint) -> bool:
        return constraint in self._cache

    def _compile(self, constraint: Constraint) -> Matcher:
        param = constraint.param
        limit = MAX_REGEX if constraint.kind == "regex" else MAX_LENGTH
        if len(constraint.value) > limit:
            raise InvalidRequest(
                f"constraint of {len(constraint.value)} characters; at most {limit} are allowed",
                param=param,
            )
        try:
            grammar = self._grammar(constraint)
        except ValueError as error:
            raise InvalidRequest(f"invalid JSON schema: {error}", param=param) from error
        native = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        # Some constraints turn out to be too complex, or to match nothing, at the first mask only.
        if not native.is_error():
            native.compute_bitmask()
        if native.is_error():
            message = _brief(native.get_error())
            if message in _DEAD_END:
                message = "it matches no text"
            raise InvalidRequest(f"invalid {_LABEL[constraint.kind]}: {message}", param=param)
        return Matcher(native, self._tokenizer.vocab_size, param)

    def _grammar(self, constraint: Constraint) -> str:
        kind, value = constraint.kind, constraint.value
        if kind == "regex":
            return LLMatcher.grammar_from_regex(value)
        if kind == "lark":
            return LLMatcher.grammar_from_lark(bind_markers(value, self._special))
        schema = '{"type":"object"}' if kind == "json_object" else value
        return LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": WHITESPACE}
        )


def _brief(message: str) -> str:
    """An error without the mark that llguidance leaves where it withholds its state."""
    return message.removesuffix("<non-verbose/>").strip()[:500]
