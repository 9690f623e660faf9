"""Strict configuration: every mistake names the key, the value and the nearest known name."""

from pathlib import Path

import pytest
from pydantic import Field

from groundup.base.config import Config, apply_overrides, load_yaml, parse_config
from groundup.base.errors import UserError


class Inner(Config):
    lr: float = 1e-3
    steps: int = Field(10, gt=0)


class Outer(Config):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: list[Inner] = []


def test_values_overrides_and_defaults() -> None:
    tree = apply_overrides({"name": "x", "inner": {"lr": "1e-5"}}, ["inner.steps=20", "maybe.lr=0.5"])
    config = parse_config(Outer, tree, "r.yaml")
    assert (config.inner.lr, config.inner.steps, config.maybe) == (1e-5, 20, Inner(lr=0.5))


def test_overrides_do_not_change_their_input() -> None:
    tree = {"name": "x", "inner": {"lr": 1.0}}
    apply_overrides(tree, ["inner.lr=2"])
    assert tree == {"name": "x", "inner": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"name": "x", "iner": {}}, ["r.yaml", "'iner'", "did you mean 'inner'"]),
        ({"name": "x", "inner": {"lrr": 1}}, ["'inner.lrr'", "did you mean 'lr'"]),
        ({"name": "x", "maybe": {"stepz": 1}}, ["'maybe.stepz'", "did you mean 'steps'"]),
        ({"name": "x", "inner": {"zzz": 1}}, ["known keys: lr, steps"]),
        ({}, ["'name' is missing"]),
        ({"name": "x", "inner": {"steps": 2.5}}, ["inner.steps", "2.5"]),
        ({"name": "x", "inner": {"steps": 0}}, ["inner.steps", "greater than 0"]),
    ],
)
def test_mistakes_are_named(tree: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(Outer, tree, "r.yaml")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("item", ["no-equals", "=1", "name.deeper=1", "inner.lr=[1"])
def test_bad_overrides(item: str) -> None:
    with pytest.raises(UserError, match="override"):
        apply_overrides({"name": "x"}, [item])


@pytest.mark.parametrize("text", ["a: 1\na: 2", "- 1", "a: [", "a: !!python/object/apply:os.system ['true']"])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_yaml(path)


def test_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("off", "off"), ("on", "on"), ("no", "no"), ("true", True), ("False", False), ("1", 1)]
)
def test_booleans_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"a: {text}")
    assert load_yaml(path) == {"a": value} == apply_overrides({}, [f"a={text}"])
