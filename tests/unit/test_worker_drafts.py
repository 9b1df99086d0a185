"""Which file drafts for which: the rule, on headers made up."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from worker.drafts import (
    LEAST_GAIN,
    PADDING,
    expected_gain,
    find_draft,
    may_draft,
    read_candidates,
)
from worker.gguf_header import Header, SpecialTokens

GIB = 1 << 30


def model(path: str = "big.gguf", *, size: int = 8 * GIB, bits: float = 16, **other) -> Header:
    return Header(
        path=path,
        name=other.pop("name", "Big"),
        architecture=other.pop("architecture", "qwen3"),
        file_type=1,
        size=size,
        modified=0,
        parts=1,
        tensors=1,
        tensor_bytes=size,
        parameters=int(size * 8 / bits),
        block_count=other.pop("block_count", 30),
        context_length=4096,
        embedding_length=1024,
        feed_forward_length=4096,
        head_count=16,
        head_counts_kv=(4,),
        key_length=64,
        value_length=64,
        kv_bytes_per_token=1024,
        vocabulary=other.pop("vocabulary", 1000),
        experts=0,
        chat_template=True,
        tokenizer="gpt2",
        pre_tokenizer="qwen2",
        special_tokens=SpecialTokens(1, 2, 3),
        **other,
    )


def requantized(path: str = "q4.gguf", size: int = 2 * GIB) -> Header:
    return model(path, size=size, bits=4.5)


def relative(path: str = "small.gguf", size: int = GIB // 2) -> Header:
    return model(path, size=size, bits=8.5, name="Small", block_count=12)


TARGET = model()


def test_a_requantization_of_the_same_model_counts():
    assert find_draft(TARGET, [TARGET, requantized()]) == requantized()


def test_a_smaller_relative_counts():
    assert find_draft(TARGET, [relative()]) == relative()


def test_a_mixture_takes_its_dense_relative():
    assert find_draft(model(architecture="qwen3moe"), [relative()]) == relative()


def test_what_agrees_more_wins_at_the_same_cost_and_what_costs_less_at_the_same_kinship():
    assert find_draft(TARGET, [relative(size=GIB), requantized(size=GIB)]) == requantized(size=GIB)
    tiny = relative("tiny.gguf", size=GIB // 8)
    assert find_draft(TARGET, [relative(), tiny]) == tiny
    # What the 2-bit file saves in bytes, it loses in agreement.
    two_bits = model("q2.gguf", size=int(1.2 * GIB), bits=2.6)
    assert find_draft(TARGET, [two_bits, requantized()]) == requantized()


def test_a_named_family_goes_before_a_mere_architecture():
    target = replace(TARGET, basename="Qwen3")
    kin = replace(relative("kin.gguf"), basename="qwen3")
    assert find_draft(target, [relative("a.gguf"), kin]) == kin


@pytest.mark.parametrize(
    "change",
    [
        {"path": TARGET.path},
        {"tensor_bytes": 4 * GIB + 1},
        {"tensor_bytes": 0},
        {"architecture": "llama"},
        {"tokenizer": "llama"},
        {"pre_tokenizer": "llama-bpe"},
        {"vocabulary": 1000 + PADDING + 1},
        {"vocabulary": 0},
        {"special_tokens": SpecialTokens(1, 3, 2)},
        {"causal": False},
        {"recurrent": True},
    ],
)
def test_what_cannot_draft(change: dict):
    assert may_draft(TARGET, requantized())
    assert find_draft(TARGET, [replace(requantized(), **change)]) is None


def test_a_recurrent_target_takes_no_draft():
    assert find_draft(replace(TARGET, recurrent=True), [requantized()]) is None


def test_a_vocabulary_may_be_padded():
    assert find_draft(TARGET, [replace(requantized(), vocabulary=1000 - PADDING)]) is not None


def test_what_promises_too_little_is_left_alone():
    half = replace(relative(size=4 * GIB), name="Half")
    assert may_draft(TARGET, half)
    assert expected_gain(TARGET, half) < LEAST_GAIN
    assert find_draft(TARGET, [half]) is None


drafts = st.builds(
    model,
    st.sampled_from("abcdefgh").map("{}.gguf".format),
    size=st.integers(GIB // 64, 10 * GIB),
    bits=st.sampled_from([2.6, 3.4, 4.5, 8.5, 16]),
    name=st.sampled_from(["Big", "Small"]),
    architecture=st.sampled_from(["qwen3", "qwen3moe", "llama"]),
    vocabulary=st.sampled_from([1000, 1100, 2000]),
)


@given(st.lists(drafts, max_size=6), st.randoms())
def test_the_most_promising_is_found_in_any_order(others: list[Header], random):
    found = find_draft(TARGET, others)
    fit = [other for other in others if may_draft(TARGET, other)]
    best = max((expected_gain(TARGET, other) for other in fit), default=0.0)
    if found is None:
        assert best < LEAST_GAIN
    else:
        assert found in fit
        assert expected_gain(TARGET, found) == best
    random.shuffle(others)
    again = find_draft(TARGET, others)
    assert (again and expected_gain(TARGET, again)) == (found and expected_gain(TARGET, found))


@given(drafts, st.integers(0, 90 * GIB))
def test_a_draft_promises_no_less_for_a_larger_target(draft: Header, more: int):
    larger = replace(TARGET, tensor_bytes=TARGET.tensor_bytes + more)
    assert expected_gain(larger, draft) >= expected_gain(TARGET, draft)


def test_broken_and_larger_files_are_passed_over(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "good.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("a", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "large.gguf").write_bytes((tmp_path / "good.gguf").read_bytes() + bytes(4096))
    paths = [tmp_path / name for name in ("broken.gguf", "gone.gguf", "large.gguf", "good.gguf")]
    most = (tmp_path / "good.gguf").stat().st_size
    assert [Path(h.path).name for h in read_candidates(paths, most)] == ["good.gguf"]
