"""Optional parts of the package, which need packages of their own."""

import importlib.util

from groundup.base.errors import UserError


def need_extra(extra: str, *modules: str) -> None:
    """Raises: UserError that says how to get the modules that are missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"`groundup {extra}` needs packages that are not installed ({', '.join(missing)})",
            f"pip install 'groundup[{extra}]'",
        )
