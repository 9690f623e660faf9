"""How a plan looks on a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.table import Table

UNKNOWN = "?"


@dataclass
class StagePlan:
    """One row of the plan; None is what nobody can know before earlier stages have run."""

    stage: str
    artifact: str
    state: str
    parameters: int | None = None
    tokens: float | None = None
    flops: float | None = None
    memory_bytes: float | None = None
    disk_bytes: float | None = None
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)


def plan_table(rows: Sequence[StagePlan], *, detailed: bool) -> Table:
    """The plan as a table; `detailed` adds FLOPs, memory and disk."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("parameters", "tokens", *(("FLOPs", "memory", "disk") if detailed else ()), "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [UNKNOWN if value is None else short_number(value) for value in (row.parameters, row.tokens)]
        if detailed:
            cells += [_power(row.flops), _bytes(row.memory_bytes), _bytes(row.disk_bytes)]
        trains = row.stage in ("pretrain", "sft_v1", "sft_v2")
        time = "-" if row.state == "finished" else _duration(row.seconds)
        table.add_row(row.stage, row.state, *(cell if trains or cell != UNKNOWN else "" for cell in cells), time)
    known = [row.seconds or 0 for row in rows]
    more = "> " if any(row.seconds is None for row in rows) else ""
    table.add_row("all", "", *[""] * (len(table.columns) - 3), more + _duration(sum(known)), style="bold")
    return table


def short_number(value: float) -> str:
    """Three significant digits with k, M, B or T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _power(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for limit, unit in ((1e12, "TB"), (1e9, "GB")):
        if value >= limit:
            return f"{value / limit:,.1f} {unit}"
    return f"{value / 1e6:,.0f} MB" if value >= 1e6 else "< 1 MB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    for limit, unit in ((86400 * 365.25, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:,.{0 if seconds >= 100 * limit else 1}f} {unit}"
    return f"{seconds:.0f} s"


def notes(rows: Sequence[StagePlan]) -> Iterator[str]:
    """What was assumed, and what is in the way, a line each."""
    for row in rows:
        for note in row.notes:
            yield f"{row.stage}: {note}"
