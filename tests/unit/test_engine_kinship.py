"""One model in two formats is told from two models."""

import gguf
import numpy as np
import pytest

from worker.engine.speculation.kinship import same_model
from worker.gguf_header import GgufError

WIDTH = 32


def write(path, *, seed=0, quantized=False, bias=False, norm=np.float32, **settings):
    """A model of one layer: a matrix, which may be quantized, and a norm."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(1)
    for key, value in settings.items():
        writer.add_float32(f"llama.rope.{key}", value)
    writer.add_file_type(2 if quantized else 0)
    matrix = draw.standard_normal((4, WIDTH)).astype(np.float32)
    if quantized:
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(matrix, kind), raw_dtype=kind)
    else:
        writer.add_tensor("blk.0.attn_q.weight", matrix)
    writer.add_tensor("blk.0.attn_norm.weight", draw.standard_normal(WIDTH).astype(norm))
    if bias:
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def target(tmp_path):
    return write(tmp_path / "target.gguf", freq_base=1e4)


def test_a_requantized_model_is_the_same(target, tmp_path):
    assert same_model(target, write(tmp_path / "draft.gguf", quantized=True, freq_base=1e4))


def test_what_only_one_file_says_of_the_model_does_not_count(target, tmp_path):
    assert same_model(target, write(tmp_path / "draft.gguf", quantized=True))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1, "freq_base": 1e4},
        {"freq_base": 1e5},
        {"bias": True, "freq_base": 1e4},
        {"norm": np.float16, "freq_base": 1e4},
    ],
    ids=["other weights", "other positions", "a tensor more", "vectors in another format"],
)
def test_another_model_is_not(target, tmp_path, other):
    assert not same_model(target, write(tmp_path / "draft.gguf", quantized=True, **other))


def test_a_file_that_is_no_model_is_an_error(target, tmp_path):
    broken = tmp_path / "draft.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(GgufError, match="not a GGUF file"):
        same_model(target, broken)
