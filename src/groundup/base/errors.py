"""The one exception a user may see.

    Exception
    └── UserError        something the user can fix: a key, a file, a value, a full disk
        └── CorruptFile  a file whose bytes are not what its manifest or its format says

Broken invariants of our own are assertions. The command line prints a `UserError` as one message
and exits with status 2.
"""


class UserError(Exception):
    """What is wrong, where, and (in `remedy`) what to do about it."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}\n  remedy: {remedy}")
        self.message = message
        self.remedy = remedy


class CorruptFile(UserError):
    """A truncated, bit-flipped or malformed file; the message names the file and what was found."""
