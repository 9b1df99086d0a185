"""What came of the checks, and how it looks in a terminal."""

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mesh.verify.finding import Outcome

__all__ = ("Report", "Row", "report_view")

_COLOURS = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


class Row(msgspec.Struct, frozen=True):
    """What came of one check."""

    name: str
    about: str
    outcome: Outcome
    seconds: float
    detail: str


class Report(msgspec.Struct, frozen=True):
    """What came of all of them."""

    url: str
    model: str
    checks: tuple[Row, ...]

    def count(self, outcome: Outcome) -> int:
        """Checks that ended so."""
        return sum(row.outcome == outcome for row in self.checks)


def report_view(report: Report) -> RenderableType:
    """A row for each check, and how many ended how."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("check", "result", "seconds", "what was seen"):
        table.add_column(column, overflow="fold", no_wrap=column != "what was seen")
    for row in report.checks:
        table.add_row(
            Text(row.name),
            Text(row.outcome, style=_COLOURS[row.outcome]),
            Text(f"{row.seconds:.2f}", justify="right"),
            Text(_words(row)),
        )
    return Group(table, Text(""), _summary(report))


def _words(row: Row) -> str:
    return f"{row.about}: {row.detail}" if row.detail else row.about


def _summary(report: Report) -> Text:
    counts = [f"{report.count('pass')} passed", f"{report.count('fail')} failed"]
    counts.append(f"{report.count('skipped')} skipped")
    return Text(f"{', '.join(counts)} at {report.url} with {report.model}")
