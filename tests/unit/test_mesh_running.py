import contextlib
import stat
from pathlib import Path

import pytest

from mesh.errors import CommandError
from mesh.running import Running, claim, default_data_dir, find, publish

RUNNING = Running(
    pid=1, started=2.0, url="http://127.0.0.1:9337/v1", nats="nats://a:b@c:4222", models=("m",)
)


def test_what_is_published_is_found_until_the_end(tmp_path: Path) -> None:
    with claim(tmp_path / "new" / "folder"):
        publish(tmp_path / "new" / "folder", RUNNING)
        assert find(tmp_path / "new" / "folder") == RUNNING
    with pytest.raises(CommandError, match="no mesh runs"):
        find(tmp_path / "new" / "folder")


def test_the_record_is_for_its_owner_only(tmp_path: Path) -> None:
    with claim(tmp_path):
        publish(tmp_path, RUNNING)
        assert stat.S_IMODE((tmp_path / "running.json").stat().st_mode) == 0o600


def test_the_record_goes_even_when_the_run_fails(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), claim(tmp_path):
        publish(tmp_path, RUNNING)
        raise RuntimeError
    assert not (tmp_path / "running.json").exists()


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with (
        claim(tmp_path),
        pytest.raises(CommandError, match="runs already"),
        claim(tmp_path),
    ):
        pytest.fail("two owners")


def test_a_record_without_its_process_is_stale(tmp_path: Path) -> None:
    with claim(tmp_path):
        publish(tmp_path, RUNNING)
        left = (tmp_path / "running.json").read_bytes()
    (tmp_path / "running.json").write_bytes(left)
    with pytest.raises(CommandError, match=r"process 1\) has ended"):
        find(tmp_path)
    with claim(tmp_path), pytest.raises(CommandError, match="no mesh runs"):
        find(tmp_path)


def test_a_damaged_record_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "running.json").write_text("{}")
    with pytest.raises(CommandError, match="damaged"):
        find(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CommandError, match="cannot use the data folder"),
        claim(tmp_path / "file" / "x"),
    ):
        pytest.fail("claimed")


def test_the_default_folder_follows_xdg() -> None:
    assert default_data_dir({"XDG_STATE_HOME": "/state"}) == Path("/state/mesh")
    fallback = Path.home() / ".local" / "state" / "mesh"
    assert default_data_dir({}) == fallback
    assert default_data_dir({"XDG_STATE_HOME": "relative"}) == fallback
