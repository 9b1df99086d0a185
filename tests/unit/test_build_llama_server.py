"""Building the peer: which version, what the build says, and when it is done already."""

import platform
from pathlib import Path

import msgspec
import pytest

from loadtests.peers import build_llama_server as builder
from loadtests.peers.build_llama_server import (
    PROGRAMS,
    BuildFailed,
    Stamp,
    build,
    built_server,
    configure_arguments,
    percent_done,
    pinned_version,
)


@pytest.mark.parametrize(
    "line",
    ["llama_cpp_python==0.3.36", "llama-cpp-python == 0.3.36", "Llama.Cpp.Python==0.3.36 # x"],
)
def test_the_version_is_the_pinned_one_however_it_is_spelled(line: str) -> None:
    assert pinned_version(f"# pins\nhttpx==0.28.1\n{line}\nnumpy==2.4.6\n") == "0.3.36"


@pytest.mark.parametrize("text", ["", "# llama_cpp_python==0.3.36\n", "llama_cpp_python>=0.3\n"])
def test_without_a_pinned_version_nothing_is_built(text: str) -> None:
    with pytest.raises(BuildFailed, match=r"constraints\.txt pins no llama-cpp-python"):
        pinned_version(text)


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("[ 42%] Building CXX object x.cpp.o", 42),
        ("[100%] Built target llama-server", 100),
        ("[12/48] Linking", 25),
        ("[3/0] nonsense", None),
        ("-- Configuring done", None),
    ],
)
def test_how_far_a_build_is_comes_from_its_output(line: str, percent: int | None) -> None:
    assert percent_done(line) == percent


def test_llama_cpp_itself_is_configured_and_nothing_is_fetched_for_it() -> None:
    command = configure_arguments(Path("/s"), Path("/b"))
    assert command[1:5] == ["-S", "/s/vendor/llama.cpp", "-B", "/b"]
    assert {"-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_USE_PREBUILT_UI=OFF"} <= set(
        command
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a build that is done, on a machine where none could be made."""
    version = pinned_version(builder.CONSTRAINTS.read_text())
    home = tmp_path / f"llama-cpp-python-{version}"
    (home / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        (home / "bin" / name).touch()
    (home / "stamp.json").write_bytes(msgspec.json.encode(Stamp.wanted(version)))
    monkeypatch.setattr(builder.sys, "executable", str(tmp_path / "no-python"))
    return home


def test_a_finished_build_is_not_made_again(home: Path) -> None:
    assert build(home.parent) == home / "bin"
    assert built_server(home.parent) == home / "bin" / "llama-server"


@pytest.mark.parametrize("lost", ["a program", "the stamp", "half of the stamp", "the options"])
def test_a_build_that_is_not_finished_is_gone_on_with(home: Path, lost: str) -> None:
    stamp = home / "stamp.json"
    if lost == "a program":
        (home / "bin" / PROGRAMS[0]).unlink()
    elif lost == "the stamp":
        stamp.unlink()
    elif lost == "half of the stamp":
        stamp.write_bytes(stamp.read_bytes()[:20])
    else:
        stamp.write_bytes(msgspec.json.encode(Stamp("0", {}, platform.machine())))
    with pytest.raises(BuildFailed, match="no-python is not installed"):
        build(home.parent)


def test_what_is_not_built_is_said_with_the_way_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="make peers"):
        built_server(tmp_path)
