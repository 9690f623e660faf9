"""Typed look-up in what a model file says about itself; anybody may have written it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from groundup.base.errors import UserError

T = TypeVar("T")


class Fields:
    """Values by key; one of the wrong type is a `UserError` that names file, key and value."""

    def __init__(self, where: Path, values: Any, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected an object with keys, found {type(values).__name__}")
        self.where, self.values, self.prefix = where, values, prefix

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a key that is absent or null takes the default."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, value, "must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; a key that is absent or null takes the default."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._error(key, value, "must be a number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; a key that is absent or null takes the default."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "must be true or false")
        return value

    def require(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> None:
        """Refuse a value that would change the arithmetic; `allowed` names those that leave it a Llama's."""
        value = self._value(key, default)
        if value not in allowed:
            raise self._error(key, value, "is not supported", f"only {allowed[0]!r} is")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def _error(self, key: str, value: Any, problem: str, remedy: str | None = None) -> UserError:
        return UserError(f"{self.where}: {self.prefix}{key} = {value!r} {problem}", remedy)


def checked(where: Path, build: Callable[..., T], *args: Any, **fields: Any) -> T:
    """What `build` makes of the values in a file; its complaints get the file's name."""
    try:
        return build(*args, **fields)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.remedy) from None
