"""Learning rate, weight decay groups, clipping and the length of a run, against hand-made numbers."""

import pytest
import torch

from groundup.base.config import parse_config
from groundup.base.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.train.config import TrainConfig
from groundup.train.optim import lr_at, make_optimizer, scale_and_clip


def test_cosine_warms_up_peaks_and_ends_at_a_tenth() -> None:
    config = TrainConfig(steps=12, lr=1.0, warmup_steps=4)
    rates = [lr_at(step, 12, config) for step in range(12)]
    # Warm-up in quarters; then 0.1 + 0.9 (1 + cos(pi k/8)) / 2 for k = 1..8.
    expected = [
        0.25, 0.5, 0.75, 1.0, 0.9657457896300790, 0.8681980515339464, 0.7222075445642904,
        0.55, 0.3777924554357097, 0.23180194846605365, 0.1342542103699210, 0.1,
    ]  # fmt: skip
    assert rates == pytest.approx(expected, abs=1e-12)


def test_constant_schedule_stays_at_the_peak_after_warm_up() -> None:
    config = TrainConfig(steps=10, lr=2.0, schedule="constant", warmup_fraction=0.2)
    assert [lr_at(step, 10, config) for step in range(10)] == [1.0, *[2.0] * 9]


def test_without_warm_up_the_first_step_is_below_the_peak_and_the_last_at_the_floor() -> None:
    config = TrainConfig(steps=3, lr=1.0, warmup_steps=0)
    assert lr_at(0, 3, config) == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_at(2, 3, config) == pytest.approx(0.1)


def test_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    config = TrainConfig(steps=2, lr=1.0, warmup_steps=5)
    assert [lr_at(step, 2, config) for step in range(2)] == [0.2, 0.4]


def test_norm_gains_are_not_decayed_and_everything_is_in_one_group() -> None:
    model = Transformer(ModelConfig(16, 8, 1, 2, 1, 4, 12))
    optimizer = make_optimizer(model, TrainConfig(steps=1, weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert all(parameter.dim() == 1 for parameter in plain["params"])
    assert len(plain["params"]) == 3
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert (decayed["betas"], decayed["eps"], decayed["fused"]) == ((0.9, 0.95), 1e-5, True)


def test_scale_and_clip_divides_once_and_shrinks_to_the_norm() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))
    a.grad, b.grad = torch.tensor([6.0]), torch.tensor([0.0, 8.0])
    assert scale_and_clip([a, b], 2.0, clip=1.0) == pytest.approx(5.0)  # (3, 0, 4)
    assert a.grad.item() == pytest.approx(0.6)
    assert b.grad.tolist() == pytest.approx([0.0, 0.8])
    assert scale_and_clip([a, b], 1.0, clip=10.0) == pytest.approx(1.0)
    assert a.grad.item() == pytest.approx(0.6)


def test_total_steps() -> None:
    assert TrainConfig(steps=7).total_steps(100) == 7
    assert TrainConfig(epochs=1.5).total_steps(3) == 5
    assert TrainConfig(steps=7, epochs=1.5).total_steps(3) == 7, "one override is enough"
    assert TrainConfig(epochs=0.001).total_steps(3) == 1


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "give steps or epochs"),
        ({"steps": 1, "warmup": 3}, "did you mean 'warmup_steps'"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1, "precision": "fp8"}, "precision"),
    ],
)
def test_wrong_values_name_the_key(tree: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config(TrainConfig, tree, "recipe.yaml")
