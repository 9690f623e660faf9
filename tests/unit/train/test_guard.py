"""What the step guard refuses."""

import math

import pytest

from groundup.train.guard import StepGuard


def test_nan_and_infinity_are_refused_and_not_remembered() -> None:
    guard = StepGuard(8, 6.0, [])
    assert "nan" in (guard.refuse(math.nan, 1.0) or "")
    assert "inf" in (guard.refuse(1.0, math.inf) or "")
    assert guard.losses == []
    assert guard.refuse(1.0, 1.0) is None
    assert guard.losses == [1.0]


def test_spike_is_above_the_mean_plus_sigmas() -> None:
    history = [1.0, 3.0, 1.0, 3.0]  # mean 2, sample deviation 1.1547
    assert StepGuard(8, 2.0, history).refuse(2 + 2 * 1.1546, 1.0) is None
    refusal = StepGuard(8, 2.0, history).refuse(2 + 2 * 1.1548, 1.0)
    assert refusal is not None
    assert "4.3094" in refusal


def test_nothing_is_a_spike_until_half_of_the_window_is_known() -> None:
    guard = StepGuard(8, 1.0, [1.0, 1.1, 1.0])
    assert guard.refuse(1000.0, 1.0) is None


def test_a_loss_that_stays_high_becomes_the_usual_one() -> None:
    guard = StepGuard(16, 6.0, [1.0, 1.01] * 8)
    refused = [guard.refuse(5.0, 1.0) is not None for _ in range(16)]
    assert refused[0]
    assert not refused[-1]
    assert sum(refused) <= 3


def test_window_zero_turns_the_spike_guard_off() -> None:
    guard = StepGuard(0, 6.0, [])
    assert [guard.refuse(loss, 1.0) for loss in (1.0, 1.0, 1.0, 1e9)] == [None] * 4


@pytest.mark.parametrize("window", [2, 128])
def test_memory_is_bounded_and_restored(window: int) -> None:
    guard = StepGuard(window, 6.0, [])
    for step in range(300):
        guard.refuse(float(step % 7), 1.0)
    assert len(guard.losses) == window
    again = StepGuard(window, 6.0, guard.losses)
    assert again.refuse(3.0, 1.0) == guard.refuse(3.0, 1.0)
    assert again.losses == guard.losses
