"""What the documents name exists: commands, recipes, links, symbols, recipe keys and tests."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from groundup.base.config import Config
from groundup.cli import app
from groundup.stages.recipe import ROUND_SECTIONS, Recipe, load_recipe

DOCS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/paper_index.md",
    "docs/alignment.md",
    "docs/annotate.md",
    "docs/serve.md",
    "docs/rlhf_checklist.md",
    "docs/promises.md",
    "docs/log.md",
    "docs/benchmarks.md",
]
GUIDES = ["README.md", "docs/alignment.md"]
CHECKLIST = [
    *(f"G{n}" for n in range(1, 7)),
    *(f"R{n}" for n in range(1, 4)),
    *(f"P{n}" for n in range(1, 12)), "A1", "T1",
    *(f"N{n}" for n in range(1, 26) if n not in (6, 8, 11, 17, 20)), "N-PPO",
    *(f"L{n}" for n in range(1, 5)),
    *(f"S{n}" for n in range(1, 12)),
    *(f"V{n}" for n in range(1, 13)),
]  # fmt: skip


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in one of these languages; "": those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [block for language, block in found if language in languages]


def code_blocks(text: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(text, "", "bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize(("name", "least"), [("README.md", 8), ("docs/alignment.md", 3)])
def test_commands_of_the_guides_exist(root: Path, name: str, least: int) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = re.findall(r"groundup ([a-z][a-z-]*)", (root / name).read_text())
    assert len(named) > least
    assert set(named) <= set(commands)


def test_make_targets_of_the_documents_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        made = [line.split()[1] for line in code_blocks((root / name).read_text()) if line.startswith("make ")]
        assert made, name
        assert set(made) <= targets


@pytest.mark.parametrize(("name", "least"), [("README.md", 3), ("docs/alignment.md", 1)])
def test_run_lines_are_valid_recipes(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, least: int) -> None:
    """Each `groundup run` line parses with its overrides; recipes run in tests/stages and `make quickstart`."""
    monkeypatch.chdir(root)
    lines = [line for line in code_blocks((root / name).read_text()) if line.startswith("groundup run")]
    assert len(lines) >= least
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


def test_yaml_of_the_guide_is_valid_in_a_recipe(root: Path, tmp_path: Path) -> None:
    judges = set()
    for block in blocks((root / "docs/alignment.md").read_text(), "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"name: guide\n{block}")
        recipe = load_recipe(path, [])
        assert recipe.model_fields_set > {"name"}
        judges.add(recipe.collect.judge if recipe.collect else None)
    assert judges >= {"rubric", "llm", "human", "import"}


@pytest.mark.parametrize("name", [*GUIDES, "docs/rlhf_checklist.md"])
def test_recipe_keys_of_the_guides_exist(root: Path, name: str) -> None:
    sections = "|".join(field.alias or key for key, field in Recipe.model_fields.items())
    for key in re.findall(rf"`((?:{sections})\.[a-z0-9_.]+)(?:: [^`]+)?`", (root / name).read_text()):
        assert is_recipe_key(key), f"{name}: no recipe key {key}"


def test_keys_in_the_guides_table_of_sections_exist(root: Path) -> None:
    lines = (root / "docs/alignment.md").read_text().splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("|")]
    table = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    found = {section: keys for sections, keys in table for section in sections if is_recipe_key(section)}
    assert found.keys() >= {"prompts", "rounds", *ROUND_SECTIONS, "ppo", "evaluate"}
    for section, keys in found.items():
        for key in keys:
            known = is_recipe_key(f"{section}.{key}") or is_recipe_key(f"{section}.sources.{key}")
            assert known, f"no recipe key {section}.{key}"


def test_the_checklist_is_whole(root: Path) -> None:
    rows = [line.split("|") for line in (root / "docs/rlhf_checklist.md").read_text().splitlines()]
    cells = {row[1].strip(): row[3] for row in rows if len(row) == 5 and row[1].strip() not in ("line", "---")}
    assert list(cells) == CHECKLIST
    for line, text in cells.items():
        assert "`tests/" in text or text.startswith(" Does not apply"), f"{line}: neither a test nor a reason"


@pytest.mark.parametrize("name", DOCS)
def test_tests_named_in_documents_exist(root: Path, name: str) -> None:
    for test in re.findall(r"`(tests/[^`]*::[^`]*)`", (root / name).read_text()):
        assert is_test(root, test), f"{name}: no test {test}"


def is_test(root: Path, test: str) -> bool:
    """Whether "path::function" or "path::Class::function" can be given to pytest."""
    path, *names = test.split("::")
    if not (root / path).exists():
        return False
    scope = ast.parse((root / path).read_text()).body
    for name in names:
        found = [node for node in scope if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        scope = found[0].body
    return True


def index_rows(root: Path) -> list[list[str]]:
    rows = []
    for line in (root / "docs/paper_index.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[1].startswith("`"):
            rows.append(cells)
    return rows


def test_the_paper_index_names_what_exists(root: Path) -> None:
    rows = index_rows(root)
    assert len(rows) > 70
    for statement, symbol, key, test in rows:
        resolve(symbol.strip("`"))
        assert is_recipe_key(key.strip("`")), f"{statement}: no recipe key {key}"
        test = test.strip("`")
        assert is_test(root, test) if "::" in test else (root / test).exists(), f"{statement}: no test {test}"


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
