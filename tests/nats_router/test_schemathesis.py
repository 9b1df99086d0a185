"""The router against its own OpenAPI description: Schemathesis makes up requests, good and bad."""

import asyncio
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.nats, pytest.mark.timeout(300)]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "chunks_conform",
)
FEWEST = 2000
MODEL = "schemathesis/model:Q4"
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")


async def schemathesis(url: str, folder: Path) -> tuple[int, str]:
    """Run it as a process; returns exit code and all it said."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "schemathesis"),
        *("run", f"{url}/openapi.json", f"--checks={','.join(CHECKS)}"),
        *("--phases=examples,coverage,fuzzing", "--mode=all", "--max-examples=300"),
        "--generation-deterministic",
        *("--continue-on-failure", "--no-color", "--request-timeout=20", "--workers=1"),
    ]
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=kept | {"SCHEMATHESIS_HOOKS": str(HOOKS), "MESH_TEST_MODEL": MODEL},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode()


def samples(text: str) -> Counter[tuple[str, str]]:
    """Requests by route and status, as the router counted them."""
    counts: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "mesh_router_requests_total":
                key = (sample.labels["route"], sample.labels["status"])
                counts[key] += int(sample.value)
    return counts


async def test_the_router_does_what_its_description_says(
    router, http, start_worker, eventually, tmp_path
):
    await start_worker(model=MODEL)
    await eventually(lambda: router.dispatcher.informed)

    code, said = await schemathesis(router.url, tmp_path)
    counts = samples((await http.get(f"{router.url}/metrics")).text)

    assert code == 0, said
    generated = re.search(r"(\d+) generated", said)
    assert generated is not None, said
    assert int(generated[1]) >= FEWEST
    # The router's own count leaves out probes and metrics.
    assert sum(counts.values()) >= FEWEST
    assert not [key for key in counts if key[1].startswith("5")], counts
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        assert counts[route, "200"] >= 100, counts
        assert counts[route, "400"] >= 100, counts
