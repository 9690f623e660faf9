"""Training metrics on disk: one JSON object a line, and the same scalars for TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from groundup.base.files import write_text

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends scalars by step to `folder/metrics.jsonl` and, where tensorboard is installed, to an event file.

    Why: on resuming at step S, lines of steps >= S are cut away first, so that the log of a killed and resumed run is
    that of an uninterrupted one (apart from the keys that hold times).
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] < resume_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._events = _event_writer(folder, resume_step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the scalars of one step; `None` values are left out."""
        row = {"step": step, **{key: value for key, value in values.items() if value is not None}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(step, row)

    def sync(self) -> None:
        """Put what was logged on the disk, before a checkpoint that relies on it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _Events:
    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        if resume_step:
            # TensorBoard drops what an interrupted run wrote at or after this step.
            self._writer.add_event(Event(step=resume_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, row: dict[str, Any]) -> None:
        import time

        values = [
            self._summary.Value(tag=key, simple_value=float(value))
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        ]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _event_writer(folder: Path, resume_step: int) -> _Events | None:
    try:
        return _Events(folder, resume_step)
    except ImportError:
        return None
