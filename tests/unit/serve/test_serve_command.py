"""`groundup serve`: names of models, keys, and mistakes that end in one message."""

import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from groundup import cli
from groundup.base.errors import UserError
from groundup.serve.run import named_models, read_keys


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folders that exist, which is all that names need."""
    for name in ("one/base", "two/base", "two/chat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tiny.gguf").touch()
    return tmp_path


def test_names_of_models(models: Path) -> None:
    found = named_models(
        [f"{models}/one/base", f"{models}/tiny.gguf"], [f"mine={models}/two/base", f"x={models}/two/chat"]
    )
    assert found == {
        "base": models / "one/base",
        "tiny.gguf": models / "tiny.gguf",
        "mine": models / "two/base",
        "x": models / "two/chat",
    }
    assert list(named_models([f"{models}/one/base"] * 2, [])) == ["base"]


@pytest.mark.parametrize(
    ("paths", "names", "words"),
    [
        ([], [], "no model to serve"),
        (["one/base", "two/base"], [], "two models are called 'base'"),
        (["nowhere"], [], "no such file or folder"),
        ([], ["=one/base"], "NAME=MODEL"),
        ([], ["mine="], "NAME=MODEL"),
        ([], ["mine"], "NAME=MODEL"),
    ],
)
def test_names_that_cannot_be(
    models: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], names: list[str], words: str
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(UserError, match=words):
        named_models(paths, names)


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert read_keys(file, {"GROUNDUP_API_KEY": "three"}) == ("one", "two")
    assert read_keys(None, {"GROUNDUP_API_KEY": "three"}) == ("three",)
    assert read_keys(None, {"GROUNDUP_API_KEY": ""}) == read_keys(None, {}) == ()


@pytest.mark.parametrize("text", ["", "\n \n", "a key", "schlüssel"])
def test_keys_that_cannot_be(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UserError):
        read_keys(file, {})


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{folder}/nowhere"], "no such file or folder"),
        ([], "no model to serve"),
        (["{folder}/one/base", "--engine", "tgi"], "engine = 'tgi' is not known"),
        (["{folder}/one/base", "--weights", "int3"], "int3"),
        (["{folder}/one/base", "--port", "{port}"], "cannot listen on 127.0.0.1"),
        (["{folder}/one/base", "--port", "0", "--host", "0.0.0.0"], "nothing asks who is there"),
        (["{folder}/one/base", "--port", "0", "--api-key-file", "{folder}/nowhere"], "No such file"),
        (["{folder}/one/base", "--port", "0"], "config.json"),
    ],
)
def test_mistakes_are_one_message_and_status_2(
    models: Path, taken_port: int, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    filled: list[Any] = [option.format(folder=models, port=taken_port) for option in options]
    result = CliRunner(env={"GROUNDUP_API_KEY": ""}).invoke(cli.app, ["serve", *filled])
    output = result.output + capsys.readouterr().err
    assert result.exit_code == 2, output
    assert words in output
    assert "Traceback" not in output


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    result = CliRunner().invoke(cli.app, ["serve", "model"])
    output = result.output + capsys.readouterr().err
    assert result.exit_code == 2
    assert "pip install 'groundup[serve]'" in output
