"""What the services refuse, each with the HTTP status that says it; the message is for the person at the browser."""

from groundup.base.errors import UserError


class Refused(UserError):
    """Base of all refusals."""

    status = 400


class Invalid(Refused):
    """The request itself is wrong: a value, a missing field."""

    status = 422


class NotSignedIn(Refused):
    """No account belongs to what was given; never says which part of it was wrong."""

    status = 401


class Forbidden(Refused):
    """This account may not do that."""

    status = 403


class NotFound(Refused):
    """No such thing, or none that this account may know of."""

    status = 404


class Conflict(Refused):
    """Somebody was faster: another tab, another person, a lease that ran out."""

    status = 409


class TooManyAttempts(Refused):
    """Wait before trying again."""

    status = 429

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__("too many attempts", f"try again in {retry_after_seconds} seconds")
        self.retry_after_seconds = retry_after_seconds
