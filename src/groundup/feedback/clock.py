"""The time, as a thing that tests can turn: leases and sessions expire without anybody waiting."""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Now, with its time zone."""


def utc_now() -> datetime:
    """The clock of the real world."""
    return datetime.now(UTC)
