"""The proxy configurations in infra/, read by the real programs where they are installed.

HAProxy's is also run, by the end-to-end tests.
"""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

PROXY = Path(__file__).parents[2] / "infra" / "proxy"
# Distributions keep daemons in folders that not every PATH holds.
PLACES = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
NGINX = shutil.which("nginx", path=PLACES)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_it(tmp_path: Path) -> None:
    text = (PROXY / "nginx.conf").read_text()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # A check opens the port too.
    text, replaced = re.subn(r"listen 127\.0\.0\.1:8080;", f"listen 127.0.0.1:{port};", text)
    assert replaced == 1
    (tmp_path / "nginx.conf").write_text(text)

    done = subprocess.run(
        [str(NGINX), "-t", "-p", str(tmp_path), "-e", "stderr", "-c", "nginx.conf"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


@pytest.mark.parametrize("name", ["haproxy.cfg", "nginx.conf"])
def test_it_listens_on_loopback_until_told_otherwise(name: str) -> None:
    text = re.sub(r"#.*", "", (PROXY / name).read_text())
    listens = re.findall(r"^ +(?:bind|listen) (.*)$", text, re.MULTILINE)
    assert listens
    assert all("127.0.0.1:" in listen for listen in listens)
    assert not re.search(r"0\.0\.0\.0|\*:", text)
