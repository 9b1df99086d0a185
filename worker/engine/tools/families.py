"""The forms in which models write tool calls, and how to tell a model's form from its template."""

from typing import Literal

__all__ = (
    "MISTRAL_ARGS",
    "MISTRAL_CALLS",
    "PYTHON_TAG",
    "TOOL_CALL",
    "TOOL_CALL_END",
    "ToolFamily",
    "detect_family",
)

ToolFamily = Literal["hermes", "llama3", "mistral", "mistral_args"]
"""`hermes`: `<tool_call>{"name": …, "arguments": …}</tool_call>`, also Qwen's.
`llama3`: `{"name": …, "parameters": …}`, maybe after `<|python_tag|>`, several separated by `;`.
`mistral`: `[TOOL_CALLS][{"name": …, "arguments": …}, …]`.
`mistral_args`: `[TOOL_CALLS]name[ARGS]{…}`, Mistral's form since 2025. The parser reads both of
Mistral's forms for either family; they differ in what a forced call looks like."""

TOOL_CALL = "<tool_call>"
TOOL_CALL_END = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
MISTRAL_CALLS = "[TOOL_CALLS]"
MISTRAL_ARGS = "[ARGS]"


def detect_family(template_source: str) -> ToolFamily:
    """Tell the family from a chat template; `hermes` where the template does not say."""
    if TOOL_CALL in template_source:
        return "hermes"
    if MISTRAL_CALLS in template_source:
        return "mistral_args" if MISTRAL_ARGS in template_source else "mistral"
    if PYTHON_TAG in template_source or (
        "<|start_header_id|>" in template_source and '"parameters"' in template_source
    ):
        return "llama3"
    return "hermes"
