"""The script that makes the environment stands alone, so it is loaded by its path."""

import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from loadtests.peers.build_llama_server import AVOIDED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "infra" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pip_is_followed_from_finding_to_installing(setup_env: ModuleType) -> None:
    reader = setup_env.BuildReader()
    told = [
        reader.read(line)
        for line in (
            "Collecting numpy<3,>=1.26 (from mesh-inference==0.1.0)",
            "  [7/9] not a build",
            "Building wheels for collected packages: llama-cpp-python",
            "  Building wheel for llama-cpp-python (pyproject.toml): started",
            "  [12/345] Building CXX object ggml.cpp.o",
            "  [ 40%] Building CXX object ggml.cpp.o",
            "  warning: something",
            "Installing collected packages: a, b",
        )
    ]
    assert told == [
        "finding numpy<3,>=1.26",
        "",
        "",
        "building llama-cpp-python",
        "building llama-cpp-python [12/345]",
        "building llama-cpp-python [40%]",
        "",
        "installing packages",
    ]


def test_what_is_missing_is_said_before_anything_is_made(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(setup_env.SetupError, match=r"no C\+\+ compiler"):
        setup_env.make(ROOT, tmp_path / "venv")
    (tmp_path / "c++").write_text("")
    (tmp_path / "c++").chmod(0o755)
    with pytest.raises(setup_env.SetupError, match="cmake not found"):
        setup_env.make(ROOT, tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_an_environment_that_is_up_to_date_is_left_alone(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CMAKE_ARGS", "-DX=1")
    (tmp_path / setup_env.STAMP).write_text(setup_env.fingerprint(ROOT, "-DX=1"))
    setup_env.make(ROOT, tmp_path)
    monkeypatch.setenv("CMAKE_ARGS", "-DX=2")
    with pytest.raises(setup_env.SetupError):
        setup_env.make(ROOT, tmp_path)


def fake_compiler(folder: Path, *, refuses: str) -> str:
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *{refuses}*) exit 1;; esac\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_llama_cpp_is_built_for_this_cpu_but_without_amx_and_fp16(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, refuses="nothing"))
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -mno-avx512fp16"
    assert shlex.split(setup_env.build_arguments()) == [
        "-DGGML_NATIVE=ON",
        f"-DCMAKE_C_FLAGS={flags}",
        f"-DCMAKE_CXX_FLAGS={flags}",
    ]
    # An older compiler knows some of these flags, one for another kind of CPU none.
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, refuses="-mno-amx-tile"))
    assert "-DCMAKE_CXX_FLAGS=-mno-avx512fp16" in shlex.split(setup_env.build_arguments())
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, refuses="-mno"))
    assert setup_env.build_arguments() == "-DGGML_NATIVE=ON"
    # The last one of two counts.
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    assert setup_env.build_arguments() == "-DGGML_NATIVE=ON -DGGML_NATIVE=OFF"


def test_the_peers_are_built_with_the_same_flags(setup_env: ModuleType) -> None:
    """So that what is compared is not llama.cpp with llama.cpp."""
    assert f"{setup_env.WITHOUT_AMX} {setup_env.WITHOUT_FP16}" == AVOIDED


def test_a_build_is_of_its_flags_and_its_compiler(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    built = setup_env.built_for("-DX=1")
    assert setup_env.built_for("-DX=1") == built
    assert setup_env.built_for("-DX=2") != built
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, refuses="nothing"))
    assert setup_env.built_for("-DX=1") != built


def test_constraints_are_exact_versions_without_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "nats-py==2.16.0" in lines
    for line in lines:
        name, _, version = line.partition("==")
        assert line.startswith("#") or (name and version)
        assert "/" not in line
        assert not line.startswith("-")
