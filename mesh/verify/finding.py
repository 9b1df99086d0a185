"""What a check finds, and how it is told."""

from typing import Literal

import msgspec

__all__ = ("Failed", "Fault", "Finding", "Outcome", "Passed", "Skipped", "told")

Outcome = Literal["pass", "fail", "skipped"]


class Passed(msgspec.Struct, frozen=True):
    """All is as it should be; `detail` says what was seen."""

    detail: str = ""


class Failed(msgspec.Struct, frozen=True):
    """Something is not as it should be."""

    reason: str


class Skipped(msgspec.Struct, frozen=True):
    """The check does not apply, or was not allowed."""

    reason: str


Finding = Passed | Failed | Skipped


class Fault(Exception):
    """What an endpoint does wrong, found while its answer is read: the check fails with it."""


def told(finding: Finding) -> tuple[Outcome, str]:
    """The finding as a word, and what there is to say of it."""
    if isinstance(finding, Passed):
        return "pass", finding.detail
    if isinstance(finding, Failed):
        return "fail", finding.reason
    return "skipped", finding.reason
