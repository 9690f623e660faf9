"""What the documents name exists: commands, recipes, links, symbols, recipe keys and tests."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from groundup.base.config import Config
from groundup.cli import app
from groundup.stages.recipe import Recipe, load_recipe

DOCS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/paper_index.md",
    "docs/log.md",
    "docs/benchmarks.md",
]


def code_blocks(text: str) -> list[str]:
    lines = []
    for block in re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S):
        lines += [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line]


def test_commands_of_the_readme_exist(root: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = re.findall(r"groundup ([a-z][a-z-]*)", (root / "README.md").read_text())
    assert len(named) > 8
    assert set(named) <= set(commands)


def test_make_targets_of_the_documents_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        made = [line.split()[1] for line in code_blocks((root / name).read_text()) if line.startswith("make ")]
        assert made, name
        assert set(made) <= targets


def test_run_lines_of_the_readme_are_valid_recipes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `groundup run` line parses with its overrides; recipes run in tests/stages and `make quickstart`."""
    monkeypatch.chdir(root)
    lines = [line for line in code_blocks((root / "README.md").read_text()) if line.startswith("groundup run")]
    assert len(lines) >= 3
    for line in lines:
        words = line.split()[2:]
        recipe, overrides = Path(words[0]), [word for word in words[1:] if "=" in word]
        assert load_recipe(recipe, overrides).name


def test_every_recipe_parses_and_is_named_in_the_readme(root: Path) -> None:
    recipes = sorted((root / "recipes").glob("*.yaml"))
    assert len(recipes) >= 5
    readme = (root / "README.md").read_text()
    for path in recipes:
        load_recipe(path, [])
        assert f"recipes/{path.name}" in readme


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(root: Path, name: str) -> None:
    path = root / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{name} links to {target}"


def index_rows(root: Path) -> list[list[str]]:
    rows = []
    for line in (root / "docs/paper_index.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[1].startswith("`"):
            rows.append(cells)
    return rows


def test_the_paper_index_names_what_exists(root: Path) -> None:
    rows = index_rows(root)
    assert len(rows) > 20
    for statement, symbol, key, test in rows:
        resolve(symbol.strip("`"))
        assert is_recipe_key(key.strip("`")), f"{statement}: no recipe key {key}"
        path, _, function = test.strip("`").partition("::")
        assert (root / path).exists(), f"{statement}: no {path}"
        assert not function or f"def {function}(" in (root / path).read_text(), f"{statement}: no test {function}"


def resolve(dotted: str) -> Any:
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"no module in {dotted}")


def is_recipe_key(key: str) -> bool:
    owner: Any = Recipe
    for part in key.split("."):
        fields = {field.alias or name: field for name, field in owner.model_fields.items()} if owner else {}
        if part not in fields:
            return False
        owner = config_in(fields[part].annotation)
    return True


def config_in(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := config_in(arg))), None)
