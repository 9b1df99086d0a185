"""Loaded by Schemathesis: what only we know of the requests and of the streams."""

import os
import secrets
from contextlib import suppress
from typing import Any

import msgspec
import schemathesis

from router.dialects.chat_objects import ChatChunk
from router.dialects.completions_answer import TextChunk

MODEL = os.environ["MESH_TEST_MODEL"]
UNKNOWN_HEADER = "x-schemathesis-unknown-property"
CHUNKS = {"/v1/chat/completions": ChatChunk, "/v1/completions": TextChunk}


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leave out what HTTP allows and Schemathesis would have refused: headers nobody knows."""
    return UNKNOWN_HEADER not in (case.headers or {})


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Have most well-formed requests ask for a model that is served, in time to get it."""
    if isinstance(case.body, dict):
        model = case.body.get("model")
        # A name of another length must be refused; some unknown ones are left as they are.
        if isinstance(model, str) and 1 <= len(model) <= 256 and len(model) % 8 != 7:
            case.body["model"] = MODEL
    if case.headers and (asked := case.headers.get("X-Request-Timeout")):
        with suppress(ValueError):
            # Else a request may rightly get a 504.
            if 0 < float(asked) < 60:
                case.headers["X-Request-Timeout"] = "60"
    if case.headers and 0 < len(case.headers.get("Idempotency-Key") or "") < 200:
        # Else one key would come with many bodies; a wrong one stays wrong.
        case.headers["Idempotency-Key"] += secrets.token_hex(8)
    return case


@schemathesis.check
def chunks_conform(context: Any, response: Any, case: Any) -> None:
    """Schemathesis sees events, not what their data holds."""
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        events = response.content.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        for event in events[:-2]:
            msgspec.json.decode(event.removeprefix("data: "), type=CHUNKS[case.operation.path])
