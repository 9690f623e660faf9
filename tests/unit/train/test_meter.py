"""Rates and memory."""

import pytest
import torch

import groundup.train.meter
from groundup.train.meter import TIMING_KEYS, Meter, matmul_flops_per_second, peak_memory_bytes

CPU = torch.device("cpu")


def test_rates_are_since_the_last_reading_and_leave_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(groundup.train.meter.time, "monotonic", lambda: now)
    monkeypatch.setattr(groundup.train.meter, "matmul_flops_per_second", lambda device, precision: 8e3)
    meter = Meter(CPU, "fp32", world_size=2, flops_per_token=10, seconds_before=50.0)
    meter.count(200)
    now = 104.0
    first = meter.read()
    assert first["tokens_per_second"] == 50.0
    assert first["seconds"] == 54.0
    assert "matmul_share" not in first, "not measured in the first seconds"
    now = 106.0
    with meter.paused():
        now = 122.0  # a checkpoint
    meter.count(1000)
    now = 125.0
    second = meter.read()
    assert second["tokens_per_second"] == 200.0
    assert second["seconds"] == 75.0
    assert second["matmul_share"] == 200 * 10 / (8e3 * 2)
    assert set(second) == set(TIMING_KEYS)


def test_matmul_rate_and_memory_are_plausible() -> None:
    assert 1e8 < matmul_flops_per_second(CPU, "fp32") < 1e15
    assert 50e6 < peak_memory_bytes(CPU) < 1e12


def test_measuring_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    matmul_flops_per_second(CPU, "bf16")
    assert torch.equal(before, torch.get_rng_state())
