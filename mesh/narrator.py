"""What `mesh up` says in the terminal: steps, progress of model loads, deaths, the ready lines."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from shared.presence import ModelState

__all__ = ("Narrator", "curl_line", "fraction")


def curl_line(url: str, model: str) -> str:
    """A shell command that asks the model something; works when pasted."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is a mesh network?"}],
        "temperature": 0,
        "max_tokens": 80,
    }
    return (
        f"curl -s {shlex.quote(url + '/chat/completions')} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def fraction(state: ModelState) -> float:
    """How much of a model is loaded, 0 to 1, from its state's detail such as `42%`."""
    if state.state != "loading":
        return 1.0
    digits = state.detail.strip().split(" ")[-1].rstrip("%")
    try:
        percent = float(digits)
    except ValueError:
        return 0.0
    return min(1.0, max(0.0, percent / 100.0))


class Narrator:
    """Progress bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._told: set[tuple[str, str]] = set()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def step(self, text: str) -> None:
        """Something has been done."""
        self._line("✓", "green", text)

    def warn(self, text: str) -> None:
        """Something has gone wrong, and the system goes on."""
        self._line("!", "yellow", text)

    def loading(self, worker: str, state: ModelState) -> None:
        """A worker has told how far a model is."""
        key = (worker, state.name)
        if state.state == "loading" and self._console.is_terminal:
            if key not in self._bars:
                self._progress.start()
                self._bars[key] = self._progress.add_task(f"{worker} loads {state.name}", total=1.0)
            self._progress.update(self._bars[key], completed=fraction(state))
        elif state.state == "loading" and key not in self._told:
            self._told.add(key)
            self._console.print(Text(f"  {worker} loads {state.name}"), soft_wrap=True)
        elif state.state == "ready":
            if key in self._bars:
                self._progress.remove_task(self._bars.pop(key))
            self.step(f"{worker} serves {state.name}: {state.slots} slots, {state.context} tokens")

    def quiet(self) -> None:
        """No more progress bars: all is loaded, or the system ends."""
        if self._progress.live.is_started:
            self._progress.stop()
        for task in self._bars.values():
            self._progress.remove_task(task)
        self._bars.clear()

    def ready(self, urls: Sequence[str], models: Sequence[str], logs: Path) -> None:
        """The last lines of a start."""
        self.quiet()
        seconds = time.monotonic() - self._began
        self._line("✓", "bold green", f"Mesh is ready after {seconds:.1f} s")
        lines = [f"  base URL  {url}" for url in urls]
        lines += [f"  models    {', '.join(models)}", f"  logs      {logs}", ""]
        lines += ["Try it:", curl_line(urls[0], models[0]), "", "Ctrl-C stops everything."]
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)

    def _line(self, mark: str, style: str, text: str) -> None:
        self._console.print(Text(mark, style=style), Text(text), soft_wrap=True)
