"""Where the commands' settings come from, and who they are to be at a NATS server."""

from pathlib import Path

import pytest
from cyclopts import App

from shared.command_line import (
    CommandFailed,
    Refused,
    identity,
    run_command,
    settings_from_file,
)


def test_whoever_the_url_names_is_who_we_are() -> None:
    assert identity("mesh", "nats://mesh-2:pw@h:1, nats://other:1") == "mesh-2"
    assert identity("mesh", "nats://127.0.0.1:4222").startswith("mesh-")
    assert identity("mesh", "nats://127.0.0.1:4222") != identity("mesh", "nats://127.0.0.1:4222")
    assert identity("mesh", "nats://token@127.0.0.1:4222").startswith("mesh-")
    with pytest.raises(Refused, match="user in the NATS URL"):
        identity("mesh", "nats://a.b:pw@127.0.0.1")


def test_a_name_goes_before_the_user_of_the_url() -> None:
    assert identity("worker", "nats://worker-1:pw@h", "gpu-7") == "gpu-7"
    with pytest.raises(Refused, match="--name"):
        identity("worker", "nats://worker-1:pw@h", "gpu.7")


@pytest.mark.parametrize(
    ("text", "part"), [("a = ", "Invalid value"), (b"\xff", "utf-8"), (None, "No such file")]
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | bytes | None, part: str) -> None:
    path = tmp_path / "mesh.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refused, match=part) as error:
        settings_from_file(path, "worker")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("raised", "code"), [(Refused("no such thing"), 2), (CommandFailed("it broke"), 1)]
)
def test_an_error_is_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], raised: Exception, code: int
) -> None:
    app = App(name="prog")

    @app.meta.default
    def fail() -> None:
        raise raised

    assert run_command(app, "prog", []) == code
    assert capsys.readouterr().err == f"prog: {raised}\n"


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    app = App(name="prog")

    @app.meta.default
    def take(*, count: int = 1) -> int:
        return count

    assert run_command(app, "prog", ["--count", "many"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--count" in told
    assert run_command(app, "prog", ["--count", "3"]) == 3
