"""Tool calls and reasoning: the grammars that force them and the parsers that find them."""

from worker.engine.tools.families import ToolFamily, detect_family
from worker.engine.tools.grammar import tool_constraint
from worker.engine.tools.parser import ToolParser
from worker.engine.tools.reasoning import ReasoningParser, reasoning_open

__all__ = (
    "ReasoningParser",
    "ToolFamily",
    "ToolParser",
    "detect_family",
    "reasoning_open",
    "tool_constraint",
)
