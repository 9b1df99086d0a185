"""How many layers go onto GPUs: as many as fit, counted from the end as llama.cpp does."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.model_shape import Layer, ModelShape, Scales, Size
from worker import agent, hardware, offload
from worker.offload import RESERVE, all_layers, built_with_cuda, fitting_layers

MIB = 1 << 20
SIZE = Size(4096, 512)


def shape(layers: int = 24, *, tied: bool = False, weights: int = 40 * MIB) -> ModelShape:
    return ModelShape(
        name="m",
        architecture="llama",
        layers=(Layer(weights, 4096),) * layers,
        embedding=100 * MIB,
        output=4096 if tied else 100 * MIB,
        width=1024,
        feed_forward=4096,
        heads=16,
        vocabulary=32000,
        context=4096,
    )


def test_all_of_it_where_there_is_room():
    model = shape()
    room = Scales(model, SIZE).whole - model.embedding  # the embedding stays in main memory
    assert fitting_layers(model, SIZE, [room + RESERVE]) == all_layers(model) == 25
    assert fitting_layers(model, SIZE, [room + RESERVE - 1]) == 24


def test_an_embedding_that_is_the_output_too_is_copied():
    model = shape(tied=True)
    whole = Scales(model, SIZE).whole
    assert fitting_layers(model, SIZE, [whole + RESERVE]) == 25
    assert fitting_layers(model, SIZE, [whole + RESERVE - model.output - 1]) == 24


def test_each_gpu_keeps_its_reserve():
    model = shape()
    room = Scales(model, SIZE).whole
    assert fitting_layers(model, SIZE, [room // 2 + RESERVE, room // 2 + RESERVE]) == 25
    assert fitting_layers(model, SIZE, [room // 2 + RESERVE // 2] * 2) < 25
    assert fitting_layers(model, SIZE, [RESERVE] * 8) == 0


def test_no_gpu_no_layers():
    assert fitting_layers(shape(), SIZE, []) == 0


@given(
    layers=st.integers(0, 40),
    weights=st.integers(0, 200 * MIB),
    free=st.lists(st.integers(0, 16 << 30), max_size=4),
    more=st.integers(0, 1 << 33),
    cells=st.integers(1, 1 << 16),
    tied=st.booleans(),
)
def test_what_is_put_there_fits_and_more_room_never_holds_less(
    layers, weights, free, more, cells, tied
):
    model, size = shape(layers, tied=tied, weights=weights), Size(cells)
    found = fitting_layers(model, size, free)
    assert 0 <= found <= all_layers(model)
    if found:
        # the output and `found - 1` layers
        count = len(model.layers)
        needed = Scales(model, size).weights(count - found + 1, count, head=True)
        assert needed - model.embedding <= sum(max(0, each - RESERVE) for each in free)
    if free:
        assert fitting_layers(model, size, [free[0] + more, *free[1:]]) >= found


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    return tmp_path


def test_a_build_with_cuda_is_known_by_its_library(libraries):
    assert not built_with_cuda()
    (libraries / "libggml-cuda.so.0").touch()
    assert built_with_cuda()


def test_the_library_beside_the_binding_counts(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    assert not built_with_cuda()
    (package / "lib" / "libggml-cuda.so").touch()
    assert built_with_cuda()


def test_without_llama_cpp_nothing_is_built(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setattr(offload.importlib.util, "find_spec", lambda _: None)
    assert not built_with_cuda()


@pytest.mark.parametrize(
    ("gpus", "cuda", "more"),
    [(True, True, 3 << 30), (True, False, 0), (False, True, 0)],
    ids=["used", "built without", "switched off"],
)
def test_a_worker_counts_the_memory_of_gpus_that_it_uses(monkeypatch, gpus, cuda, more):
    monkeypatch.setattr(hardware, "memory", lambda: SimpleNamespace(available=5 << 30))
    found = (hardware.Gpu(0, "A", 8 << 30, 4 << 30), hardware.Gpu(1, "B", 8 << 30, RESERVE // 2))
    monkeypatch.setattr(hardware, "gpus", lambda: found)
    monkeypatch.setattr(agent, "built_with_cuda", lambda: cuda)
    assert agent._free_memory(gpus=gpus) == (5 << 30) + more
