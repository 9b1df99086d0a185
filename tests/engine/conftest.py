"""The real model, and a real engine process with it, driven over the link alone."""

import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "loadtests"))

from engine_driver import EngineDriver  # noqa: E402

from loadtests.stack import smollm2_f32, smollm2_q4_0  # noqa: E402


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the model in other formats than its package's."""
    folder = tmp_path_factory.mktemp("models")
    yield folder
    shutil.rmtree(folder)  # 630 MB, which pytest would keep for three runs


@pytest.fixture(scope="session")
def q4_0(models: Path) -> Path:
    """The model of the tests that are about no format: three times as fast as its package's."""
    return smollm2_q4_0(models)


@pytest.fixture(scope="session")
def f32(models: Path) -> Path:
    return smollm2_f32(models)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(q4_0: Path) -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(str(q4_0), slots=4, context=1024, threads=1)
    await driver.start()
    yield driver
    await driver.stop()
