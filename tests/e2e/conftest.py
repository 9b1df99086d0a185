"""A whole system for the end-to-end tests: `mesh up` as a person runs it, with the real model."""

from collections.abc import Iterator

import pytest
from mesh_process import MeshUp


@pytest.fixture(scope="session")
def mesh_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshUp]:
    """One router and one worker with the real model, for all tests of a session."""
    system = MeshUp(tmp_path_factory.mktemp("mesh"), "--threads", "1")
    try:
        yield system.until_ready()
        assert system.end() == 0, system.story()
        assert system.left() == []
    finally:
        system.clear_away()
