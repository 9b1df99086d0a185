"""A whole system for the end-to-end tests: `mesh up` as a person runs it, with the real model."""

from collections.abc import Iterator

import pytest
from mesh_process import MeshUp
from openai import DefaultHttpxClient, OpenAI


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


@pytest.fixture(scope="session")
def client(mesh_system: MeshUp) -> Iterator[OpenAI]:
    """OpenAI's own client on that system; it does not try again, so that no failure is healed."""
    with OpenAI(
        base_url=mesh_system.base_url,
        api_key="not looked at",
        max_retries=0,
        timeout=100,
        http_client=DefaultHttpxClient(trust_env=False),
    ) as opened:
        yield opened
