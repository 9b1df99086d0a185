"""A real engine process with the real model, driven over the link alone."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "loadtests"))

from asking import packaged_model  # noqa: E402
from engine_driver import EngineDriver  # noqa: E402


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(str(packaged_model()), slots=4, context=1024, threads=1)
    await driver.start()
    yield driver
    await driver.stop()
