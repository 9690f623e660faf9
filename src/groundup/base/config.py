"""Typed, strict, frozen configuration: recipes hold values, Python holds structure.

Precedence: command-line override > recipe > class default. An unknown key is an error that names the nearest known one.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from groundup.base.errors import UserError


class Config(BaseModel):
    """Base of every configuration class."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)


C = TypeVar("C", bound=Config)


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent "last duplicate key wins", and with the booleans of YAML 1.2: `off` is a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise UserError(f"{node.start_mark.name}: key {key!r} appears twice (line {key_node.start_mark.line + 1})")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without running code."""
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "give the path of a recipe, e.g. recipes/quickstart.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found {type(tree).__name__}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `tree` with items such as "pretrain.steps=100" set; values are YAML."""
    tree = _copy_mappings(tree)
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"override {item!r} has no '='", "write it as key=value, e.g. pretrain.steps=100")
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            child = node.setdefault(key, {})
            if child is None:
                child = node[key] = {}
            if not isinstance(child, dict):
                raise UserError(f"override {item!r}: {key!r} is the value {child!r}, not a section")
            node = child
        try:
            node[leaf] = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader subclass
        except yaml.YAMLError as error:
            raise UserError(f"override {item!r}: the value is not valid YAML: {error}") from None
    return tree


def parse_config(cls: type[C], tree: dict[str, Any], where: str) -> C:
    """Validate `tree` as `cls`; the error names every wrong key with its full path, its value and the nearest name."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(cls, item, where) for item in error.errors())) from None


def _explain(cls: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owner = _owner(cls, item["loc"][:-1])
        known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known) or 'none'}"
        return f"{where}: unknown key {path!r}; {hint}"
    if item["type"] == "missing":
        return f"{where}: key {path!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {path or 'recipe'} = {item['input']!r}: {message}"


def _owner(cls: type[BaseModel], parts: tuple[Any, ...]) -> type[BaseModel] | None:
    """The config class that a path of field names leads to."""
    current: type[BaseModel] | None = cls
    for part in parts:
        if current is None:
            return None
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        if part in fields:
            current = _config_in(fields[part].annotation) or current
    return current


def _config_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, tuple, typing.Annotated):
        return next((found for arg in typing.get_args(annotation) if (found := _config_in(arg))), None)
    return None


def _copy_mappings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy_mappings(child) for key, child in value.items()}
    return value
