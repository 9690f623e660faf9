"""Which optimizer steps must not be taken."""

import math
import statistics
from collections import deque


class StepGuard:
    """Refuses steps whose loss or gradient is not a number, or whose loss jumps far above the usual.

    Choice: the paper reports no instabilities and no guard. A loss more than `sigmas` standard deviations above the
    mean of the last `window` steps is a spike; until half of the window is known nothing is. Spikes join the window, so
    that a loss that stays high becomes the usual one instead of stopping the run.
    """

    def __init__(self, window: int, sigmas: float, losses: list[float]) -> None:
        self.sigmas = sigmas
        self._losses: deque[float] = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """What the guard remembers, for the checkpoint."""
        return list(self._losses)

    def refuse(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be skipped, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the norm of the gradient is {grad_norm}"
        limit = self._limit()
        self._losses.append(loss)
        if limit is not None and loss > limit:
            return f"the loss jumped to {loss:.4f}, above {limit:.4f} ({self.sigmas:g} sigmas over the usual)"
        return None

    def _limit(self) -> float | None:
        window = self._losses.maxlen
        if not window or len(self._losses) < max(2, window // 2):
            return None
        return statistics.fmean(self._losses) + self.sigmas * statistics.stdev(self._losses)
