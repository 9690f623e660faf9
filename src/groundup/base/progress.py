"""Progress with rate and time left: a live bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

T = TypeVar("T")
console = Console(stderr=True)
_LINE_EVERY_SECONDS = 10.0


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{_short(task.speed or 0)} {task.fields['unit']}/s")


class Progress:
    """Counts work done; use as a context manager and call `advance`."""

    def __init__(self, description: str, total: int | None, unit: str = "items", done: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self._done_at_start = done, done
        self.note = ""
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._started = self._last_line = time.monotonic()
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.done, unit=self.unit, note=""
            )
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Report `count` more units done; `note` is a short text such as the current loss."""
        self.done += count
        if note is not None:
            self.note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._done_at_start) / seconds
        of, left = "", ""
        if self.total:
            of = f"/{self.total}"
            if rate > 0 and self.done < self.total:
                left = f", {_clock((self.total - self.done) / rate)} left"
        note = f"  {self.note}" if self.note else ""
        print(
            f"{self.description}: {self.done}{of} {self.unit}, {_short(rate)}/s{left}{note}",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print_line()


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "items") -> Iterator[T]:
    """Yield the items while showing progress."""
    with Progress(description, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def say(text: str) -> None:
    """One line for the user, on standard error, so that standard output stays for results."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
