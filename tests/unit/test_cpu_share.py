"""A process in a share of a core gets no more than that."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtests import cpu_share
from loadtests.cpu_share import NoShares


def test_a_busy_process_has_its_share_and_the_group_goes_with_it() -> None:
    try:
        with cpu_share.cpu_share("test", 0.2) as share:
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                share.take(busy.pid)
                process = psutil.Process(busy.pid)
                before, began = process.cpu_times().user, time.monotonic()
                time.sleep(1)
                used = process.cpu_times().user - before
                # A tick of the clock by which the kernel tells it is 10 ms.
                assert 0 < used <= 0.2 * (time.monotonic() - began) + 0.1
            finally:
                busy.kill()
                busy.wait()
    except NoShares as error:
        # Only root may limit processes, and not in every container.
        pytest.skip(f"needs root and control groups for CPUs: {error}")


def test_where_the_kernel_cannot_it_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu_share, "_CONTROLLERS", (tmp_path,))

    with pytest.raises(NoShares, match="no control groups"), cpu_share.cpu_share("test", 0.2):
        pass


def test_a_group_that_cannot_be_limited_is_not_left_behind(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text("-1")
    monkeypatch.setattr(cpu_share, "_CONTROLLERS", (tmp_path,))
    monkeypatch.setattr(Path, "mkdir", _refuse)

    with pytest.raises(NoShares, match="root may"), cpu_share.cpu_share("test", 0.2):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.cfs_quota_us"]


def _refuse(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))
