"""The command line is a contract: commands, arguments and options are frozen here, and mistakes end in one message."""

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from groundup import cli
from groundup.base.errors import UserError

RECIPE = ["RECIPE", "[key=value]..."]
SAMPLING = ["--max-new-tokens", "--seed", "--system", "--temperature", "--top-k", "--top-p", "--weights"]
SERVER = ["--host", "--max-tokens", "--port", "--queue", "--slots", "--weights"]
DATABASE = ["--data", "--database"]
COMMANDS: dict[str, list[str]] = {
    "run": [*RECIPE, "--out", "--until"],
    "plan": [*RECIPE, "--json", "--out"],
    "curate": [*RECIPE, "--out"],
    "tokenizer": [*RECIPE, "--out"],
    "shards": [*RECIPE, "--out"],
    "pretrain": [*RECIPE, "--out"],
    "import": [*RECIPE, "--out"],
    "sft": [*RECIPE, "--out"],
    "sft-v1": [*RECIPE, "--out"],
    "sft-v2": [*RECIPE, "--out"],
    "prompts": [*RECIPE, "--out"],
    "collect": [*RECIPE, "--out"],
    "reward": [*RECIPE, "--out"],
    "rejection": [*RECIPE, "--out"],
    "tune": [*RECIPE, "--out"],
    "dpo": [*RECIPE, "--out"],
    "ppo": [*RECIPE, "--out"],
    "evaluate": [*RECIPE, "--out"],
    "report": [*RECIPE, "--out"],
    "chat": ["MODEL", *SAMPLING],
    "generate": ["MODEL", "--num-samples", "--prompt", "--raw", "--stop", *SAMPLING],
    "serve": ["[MODEL]...", *SERVER, "--allow-host", "--api-key-file", "--engine", "--name"],
    "annotate": [*DATABASE, "--allow-host", "--handover", "--host", "--https", "--overlap", "--port"],
    "annotate export": [*DATABASE, "--held-out", "--out", "--project"],
    "annotate import": ["SRC", *DATABASE, "--new-batch", "--project"],
    "convert": ["SRC", "DST", "--dtype", "--quantisation", "--shards", "--to", "--tokenizer"],
    "show-batch": ["RECIPE", "STAGE", "[key=value]...", "--out", "--rows", "--step"],
    "lineage": ["RUN[/ARTIFACT]"],
    "data list": ["--kind"],
    "data get": ["NAME", "--out"],
}


def all_commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None or command.invoke_without_command:
            found[name] = command
        found |= {f"{name} {word}": each for word, each in (inner or {}).items()}
    return found


def test_the_set_of_commands() -> None:
    assert sorted(all_commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_and_options(name: str) -> None:
    command, expected = all_commands()[name], COMMANDS[name]
    arguments = [param.metavar for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option" and param.name != "help"]
    assert arguments == [word for word in expected if not word.startswith("--")]
    assert sorted(param.opts[0] for param in options) == sorted(word for word in expected if word.startswith("--"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    command = all_commands()[name]
    assert command.help
    assert command.epilog
    assert command.epilog.startswith(f"Example: groundup {name} ")
    assert all(getattr(param, "help", None) for param in command.params if param.name != "help")
    result = CliRunner().invoke(cli.app, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert "Example: " in result.output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom groundup.cli import main\nsys.argv = ['groundup', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'sentencepiece', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "groundup run recipes/quickstart.yaml" in " ".join(done.stdout.split())


def fail_with(error: BaseException) -> "tuple[int, str]":
    app = typer.Typer(cls=cli.Commands, pretty_exceptions_enable=False)

    @app.command()
    def broken() -> None:
        raise error

    @app.command()
    def other() -> None: ...

    result = CliRunner().invoke(app, ["broken"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def wrapped(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("a.txt: bad", "fix it"), 2, "error: a.txt: bad\n  remedy: fix it\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "b.txt"), 2, "b.txt: No such file or directory"),
        (PermissionError(errno.EACCES, "Permission denied", "c.txt"), 2, "c.txt: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "d.bin"), 2, "d.bin: the disk is full"),
        (OSError(errno.EFBIG, "File too large"), 2, "run the same command to go on"),
        (
            wrapped(RuntimeError("save failed"), OSError(errno.ENOSPC, "No space left", "e.bin")),
            2,
            "e.bin: the disk is full",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0: file write failed"),
            2,
            "disk is full",
        ),
        (KeyboardInterrupt(), 130, "run the same command to go on"),
    ],
)
def test_mistakes_are_one_message(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = fail_with(error)
    output += capsys.readouterr().err
    assert code == status
    assert words in output
    assert "Traceback" not in output


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        fail_with(KeyError("bug"))
    with pytest.raises(KeyError):
        fail_with(wrapped(KeyError("bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")))


def test_wrong_usage_names_the_mistake(tmp_path: Path) -> None:
    for arguments, words in (
        (["run"], "Missing argument 'RECIPE'"),
        (["trian", "x.yaml"], "No such command 'trian'"),
        (["run", "x.yaml", "--untill", "base"], "No such option: --untill"),
    ):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2
        assert words in result.output
