"""Errors that nobody foresaw: how they are logged, and what keeps one request's from the others."""

import logging
import traceback

import numpy as np
from numpy.typing import NDArray

from groundup.base.generation import Constraint

_logger = logging.getLogger(__name__)
_NOTHING = np.zeros(1, dtype=np.bool_)


class IsolatedConstraint:
    """A constraint whose failure ends its own response, with `error`, and not the step.

    Why: an exception in a step would end every response in it.
    """

    def __init__(self, inner: Constraint) -> None:
        self._inner = inner
        self._has_failed = False

    def allowed(self) -> NDArray[np.bool_] | None:
        if self._has_failed:
            return _NOTHING
        try:
            return self._inner.allowed()
        except Exception as error:
            self._fail(error)
            return _NOTHING

    def accept(self, token_id: int) -> None:
        try:
            self._inner.accept(token_id)
        except Exception as error:
            self._fail(error)

    @property
    def is_finished(self) -> bool:
        return not self._has_failed and self._inner.is_finished

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        log_failure("a constraint", error)


def log_failure(where: str, error: BaseException) -> None:
    """Where an error that nobody foresaw came from; without its own message, which may quote what a user sent."""
    _logger.error("%s in %s:\n%s", type(error).__name__, where, "".join(traceback.format_tb(error.__traceback__)))
