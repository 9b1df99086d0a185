"""Which drafts are refused, on real vocabularies as llama.cpp loads them."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from loadtests.stack import smollm2
from worker.engine.llama import Model, silence
from worker.engine.requantize import requantize
from worker.engine.speculation.pairing import Unpaired, check_pair

pytestmark = pytest.mark.model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Tokens = list[tuple[str, int]]
TOKENS: Tokens = [
    ("<unk>", UNKNOWN),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    ("\u2581the", NORMAL),
    ("cat", NORMAL),
    ("<tool>", NORMAL),
]
LAST = len(TOKENS) - 1


@pytest.fixture(scope="module", autouse=True)
def _silent() -> None:
    silence()


@pytest.fixture
def speaking(tmp_path: Path) -> Callable[..., Model]:
    """Make a model that is a vocabulary and nothing else."""

    def make(tokens: Tokens = TOKENS, *, tokenizer: str = "llama", **ids: int) -> Model:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model(tokenizer)
        if tokenizer == "gpt2":
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges([])
        writer.add_token_list([text for text, _ in tokens])
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([kind for _, kind in tokens])
        for name, token in ({"bos": 1, "eos": 2} | ids).items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return Model(str(path), vocab_only=True)

    return make


def changed(token: int, text: str, kind: int) -> Tokens:
    return [*TOKENS[:token], (text, kind), *TOKENS[token + 1 :]]


def test_a_model_drafts_for_itself_and_for_its_requantization(tmp_path: Path):
    small = tmp_path / "q4_0.gguf"
    requantize(smollm2(), small, "Q4_0")
    silence()
    target, draft = (Model(str(path), vocab_only=True) for path in (smollm2(), small))
    check_pair(target, target)
    check_pair(target, draft)
    check_pair(draft, target)


def test_another_tokenizer_s_model_is_refused(speaking):
    target = Model(str(smollm2()), vocab_only=True)
    with pytest.raises(Unpaired, match="tokenizer is of type"):
        check_pair(target, speaking())


def test_the_first_token_that_differs_is_named(speaking):
    draft = speaking([*changed(260, "dog", NORMAL)[:-1], ("<call>", NORMAL)])
    with pytest.raises(Unpaired, match=r"^token 260 is 'cat' in the target, 'dog' in the draft$"):
        check_pair(speaking(), draft)


def test_a_token_of_another_kind_is_refused(speaking):
    draft = speaking(changed(LAST, "<tool>", CONTROL))
    with pytest.raises(Unpaired, match=rf"^token {LAST} '<tool>' is plain in .*, control in the"):
        check_pair(speaking(), draft)


def test_kinds_that_only_concern_tokenizing_may_differ(speaking):
    check_pair(speaking(), speaking(changed(LAST, "<tool>", USER_DEFINED)))


def test_padding_at_the_end_may_differ(speaking):
    padded = speaking(TOKENS + [(f"[PAD{n}]", UNUSED) for n in range(128)])
    check_pair(speaking(), padded)
    check_pair(padded, speaking())
    with pytest.raises(Unpaired, match="262 tokens, the draft 391: more than 128 apart"):
        check_pair(speaking(), speaking(TOKENS + [(f"[PAD{n}]", UNUSED) for n in range(129)]))


def test_a_real_token_more_is_no_padding(speaking):
    longer = speaking([*TOKENS, ("[PAD]", UNUSED), ("dog", NORMAL)])
    for pair in ((speaking(), longer), (longer, speaking())):
        with pytest.raises(Unpaired, match="token 263 is no padding"):
            check_pair(*pair)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({"bos": 2}, "bos is token 1 of the target, token 2 of the draft"),
        ({"eos": 1}, "eos is token 2 of the target, token 1 of the draft"),
        ({"eot": 260}, "eot is no token of the target, token 260 of the draft"),
        ({"eom": 260}, "token 260 ends a generation of the draft alone"),
    ],
)
def test_special_tokens_must_be_the_same(speaking, ids: dict[str, int], words: str):
    with pytest.raises(Unpaired, match=rf"^{words}$"):
        check_pair(speaking(), speaking(**ids))
