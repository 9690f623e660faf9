"""The layout is a contract: imports go down only, rooms without torch stay without, packages re-export nothing."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "groundup"
ORDER = [
    "base", "text", "model", "data", "train", "infer", "align", "evals", "report", "stages", "web", "serve", "feedback"
]  # fmt: skip
TORCH_FREE = {"base", "text", "web", "feedback"}
# Longest file and function we accept. A file that outgrows this is two rooms; raise the number only with a reason here.
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imported_modules(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names.append(node.module or "")
    return names


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES} >= set(ORDER) | {"cli.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room == "cli.py":
        return
    for name in imported_modules(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        if top == "torch":
            assert room not in TORCH_FREE, f"{room} is free of torch, but imports {name}"
        if top == "groundup":
            other = rest.split(".")[0]
            assert other in ORDER[: ORDER.index(room) + 1], f"{room} may not import {other}: it comes later"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


STAGES = [path for path in FILES if path.parts[-2] == "stages"]
# Not stages: what strings stages together, and what they share.
GLUE = {"recipe", "pipeline", "plan", "show"}
SHARED = {
    "groundup.stages.job",
    "groundup.stages.trained_model",
    "groundup.stages.dialogue_training",
    "groundup.stages.models",
    "groundup.stages.resources",
}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stages_do_not_import_each_other(path: Path) -> None:
    if path.stem in GLUE:
        return
    for name in imported_modules(ast.parse(path.read_text())):
        if name.startswith("groundup.stages."):
            assert name in SHARED, f"{path.stem} imports {name}: stages meet in artifacts only"


def test_packages_are_empty() -> None:
    packages = list(PACKAGE.rglob("__init__.py"))
    assert len(packages) >= len(ORDER)
    assert [str(path) for path in packages if path.read_text().strip()] == []


def test_torchvision_is_not_installed() -> None:
    """A torchvision from the registry is built for CUDA; beside a CPU torch it breaks every import of transformers."""
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("torchvision")


def test_no_unsafe_loading() -> None:
    """Loading a file never runs code: the calls that could are not in the package at all."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = (
                call in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "os.system", "os.popen"}
                or (call == "torch.load" and keywords.get("weights_only") != "True")
                or keywords.get("trust_remote_code") == "True"
                or keywords.get("shell") == "True"
                or (call == "yaml.load" and (len(node.args) < 2 or "_StrictLoader" not in ast.unparse(node.args[1])))
            )
            if unsafe:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {call}")
    assert found == []


def test_base_imports_without_torch() -> None:
    """The command line must answer --help before torch has loaded."""
    import subprocess

    code = "import sys, groundup.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
