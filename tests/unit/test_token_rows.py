"""Tokens looked up in a model's file: the matrix's own rows, or one line that says why not."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from worker.engine.token_rows import TokenRows
from worker.gguf_file import GgufError

ROWS = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)


def write(
    path: Path,
    kind: gguf.GGMLQuantizationType,
    *,
    architecture: str = "llama",
    name: str = "token_embd.weight",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if kind == gguf.GGMLQuantizationType.I8:  # of whole numbers: nothing is quantized to it
        data = np.zeros((8, 64), dtype=np.int8)
    else:
        data = gguf.quants.quantize(ROWS, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_rows_are_the_matrixs_own(tmp_path: Path, kind: str):
    number = gguf.GGMLQuantizationType[kind]
    rows = TokenRows(write(tmp_path / "m.gguf", number))
    known = gguf.quants.dequantize(gguf.quants.quantize(ROWS, number), number)
    np.testing.assert_array_equal(rows([5, 0, 5]), known[[5, 0, 5]])
    assert rows.width == 64


def test_where_llama_cpp_scales_them_so_is_done_here(tmp_path: Path):
    path = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, architecture="gemma3")
    np.testing.assert_allclose(TokenRows(path)([3])[0], 8 * ROWS[3], rtol=1e-6)


def test_a_type_that_gguf_cannot_read_is_named(tmp_path: Path):
    path = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.I8)
    with pytest.raises(
        GgufError, match=r"m\.gguf: its embedding has type I8, which cannot be read"
    ):
        TokenRows(path)


def test_a_type_that_nobody_knows_is_told_by_its_number(tmp_path: Path):
    path = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    path.write_bytes(data[:at] + struct.pack("<I", 9999) + data[at + 4 :])
    with pytest.raises(GgufError, match="has type number 9999"):
        TokenRows(path)


def test_a_file_without_the_matrix_is_told(tmp_path: Path):
    path = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, name="other.weight")
    with pytest.raises(GgufError, match="no embedding matrix"):
        TokenRows(path)
