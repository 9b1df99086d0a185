"""Where this worker keeps what it has computed or cut, and may be deleted at any time."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ("cache_folder",)


def cache_folder() -> Path:
    """`MESH_CACHE_DIR`, else `mesh` in the user's cache folder."""
    named = os.environ.get("MESH_CACHE_DIR", "")
    user = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(named) if named else (Path(user) if user else Path("~/.cache")) / "mesh"
    # Without a home, as some services are run, there is no `~`.
    with suppress(RuntimeError):
        folder = folder.expanduser()
    return folder
