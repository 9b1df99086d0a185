"""What an engine does with GPUs. They are played where there are none: what is decided and told is
the same; that layers compute there is shown by `make check-gpu` on a host that has one."""

from pathlib import Path

import llama_cpp.llama_cpp as ll
import pytest

from loadtests.stack import smollm2
from worker import hardware
from worker.engine import gpu
from worker.engine.gpu import WHOLE_PART, Offload, offload
from worker.gguf_header import GgufError
from worker.link import EngineConfig, RingPlace
from worker.offload import RESERVE

pytestmark = pytest.mark.model

LAYERS = 30
PLACE = RingPlace("g", ("a", "b"), 0, "nats://h", "ring")


def config(**fields) -> EngineConfig:
    return EngineConfig(path=str(smollm2()), model="m", worker="w", **fields)


def decide(wanted: EngineConfig) -> Offload:
    return offload(wanted, wanted.path)


@pytest.fixture
def one_gpu(monkeypatch):
    def with_free(free: int) -> None:
        found = (hardware.Gpu(0, "NVIDIA H100", 80 << 30, free),)
        monkeypatch.setattr(hardware, "gpus", lambda: found)
        monkeypatch.setattr(ll, "llama_supports_gpu_offload", lambda: True)

    return with_free


def test_no_gpu_nothing_to_say(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", tuple)
    assert decide(config(gpu_layers=None)) == Offload(0)


def test_switched_off(one_gpu):
    one_gpu(80 << 30)
    assert decide(config(gpu_layers=0)) == Offload(0)


def test_all_layers_where_they_fit(one_gpu):
    one_gpu(80 << 30)
    assert decide(config(gpu_layers=None)) == Offload(LAYERS + 1)
    assert decide(config(gpu_layers=-1)) == Offload(LAYERS + 1)
    assert decide(config(gpu_layers=500)) == Offload(LAYERS + 1)
    assert decide(config(gpu_layers=7)) == Offload(7)


def test_as_many_as_fit_and_a_line_that_says_so(one_gpu):
    one_gpu(RESERVE + (500 << 20))
    found = decide(config(gpu_layers=None, slots=8, context=2048))
    assert 0 < found.layers < LAYERS + 1
    assert f"{found.layers} of {LAYERS + 1} layers" in found.advice
    fewer = decide(config(gpu_layers=None, slots=1, context=2048))
    assert fewer.layers > found.layers


def test_what_is_asked_for_is_done_whatever_is_free(one_gpu):
    one_gpu(RESERVE)
    assert decide(config(gpu_layers=12)) == Offload(12)


def test_a_part_is_there_as_a_whole_or_not_at_all(one_gpu):
    one_gpu(80 << 30)
    for asked in (None, -1, 3):
        assert decide(config(gpu_layers=asked, ring=PLACE, context=512)).layers == WHOLE_PART
    one_gpu(RESERVE + (50 << 20))
    found = decide(config(gpu_layers=None, ring=PLACE, context=512))
    assert found.layers == 0
    assert "computed by the CPU" in found.advice


@pytest.mark.parametrize("asked", [None, -1, 5])
def test_a_build_without_cuda_says_how_to_get_one(one_gpu, monkeypatch, asked):
    one_gpu(80 << 30)
    monkeypatch.setattr(gpu.ll, "llama_supports_gpu_offload", lambda: False)
    found = decide(config(gpu_layers=asked))
    assert found.layers == 0
    assert "NVIDIA H100" in found.advice
    assert "CMAKE_ARGS=-DGGML_CUDA=ON make env" in found.advice


def test_a_draft_is_measured_by_its_own_file(one_gpu, tmp_path: Path):
    one_gpu(80 << 30)
    asked = config(gpu_layers=None)
    assert offload(asked, asked.path).layers == LAYERS + 1
    with pytest.raises(GgufError):
        offload(asked, str(tmp_path / "none.gguf"))
