"""People: invitations, passwords, sessions. There is no default account, and nobody registers uninvited."""

import hashlib
import hmac
import math
import re
import secrets
import threading
import unicodedata
from dataclasses import dataclass
from datetime import datetime, timedelta

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from groundup.feedback.clock import Clock, utc_now
from groundup.feedback.database import Database, find
from groundup.feedback.errors import Conflict, Forbidden, Invalid, NotFound, NotSignedIn, TooManyAttempts
from groundup.feedback.tables import Assignment, Invitation, LoginFailure, LoginSession, Role, User

MIN_PASSWORD_CHARACTERS, MAX_PASSWORD_CHARACTERS = 12, 256
FREE_ATTEMPTS, MAX_WAIT_SECONDS = 5, 900
"""Wrong passwords for a name before each further one doubles the wait."""
FREE_ATTEMPTS_OF_ADDRESS = 50
_REMEMBERED = timedelta(hours=1)
_HASHES_AT_ONCE = threading.BoundedSemaphore(4)
"""Why: an argon2 hash takes 64 MB; a flood of sign-ins must not take all memory."""
_NAME = re.compile(r"[\w.@+-]{2,64}")


@dataclass(frozen=True)
class Account:
    """Somebody who is signed in, or is to be listed."""

    id: int
    name: str
    pseudonym: str
    role: Role
    is_active: bool


@dataclass(frozen=True)
class OpenInvitation:
    """A link that waits to be used; the token itself is known to its receiver alone."""

    id: int
    role: Role
    note: str
    resets: str | None
    """Name of the account whose password it resets; None: it makes an account."""
    expires_at: datetime


def csrf_token(session_token: str) -> str:
    """What forms of this session carry; a pure function of the token, which other sites never see."""
    return hmac.new(session_token.encode(), b"csrf", hashlib.sha256).hexdigest()


class Accounts:
    """Every method is one transaction. `by` is who asks; what needs an administrator says so itself."""

    def __init__(
        self,
        database: Database,
        clock: Clock = utc_now,
        *,
        session_hours: float = 12,
        invitation_hours: float = 72,
        hasher: PasswordHasher | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._session_life = timedelta(hours=session_hours)
        self._invitation_life = timedelta(hours=invitation_hours)
        self._hasher = hasher or PasswordHasher()
        self._nobodys_hash = self._hasher.hash(secrets.token_urlsafe())

    # Links

    def first_admin_token(self) -> str | None:
        """A one-time token that makes the first administrator; None once there is one. Earlier such tokens are void."""
        now = self._clock()
        with self._database.write() as session:
            if session.scalar(select(User.id).where(User.role == "admin", User.is_active).limit(1)) is not None:
                return None
            session.execute(
                update(Invitation)
                .where(Invitation.created_by.is_(None), Invitation.used_at.is_(None), Invitation.revoked_at.is_(None))
                .values(revoked_at=now)
            )
            return self._new_invitation(session, "admin", "the first administrator", None, None)

    def invite(self, by: Account, role: Role, note: str = "") -> str:
        """A one-time token with which somebody makes an account of that role. Administrators only."""
        require_admin(by)
        with self._database.write() as session:
            return self._new_invitation(session, role, note[:200], None, by.id)

    def reset_password(self, by: Account, user_id: int) -> str:
        """A one-time token with which the owner of an account sets a new password. Administrators only."""
        require_admin(by)
        with self._database.write() as session:
            user = _user(session, user_id)
            return self._new_invitation(session, user.role, "new password", user.id, by.id)

    def invitation(self, token: str) -> OpenInvitation:
        """What a token is for. Raises: NotFound for one that is unknown, used, revoked or too old."""
        with self._database.read() as session:
            row = self._open_invitation(session, token)
            return _shown(session, row)

    def open_invitations(self, by: Account) -> list[OpenInvitation]:
        """Those not yet used. Administrators only."""
        require_admin(by)
        with self._database.read() as session:
            rows = session.scalars(select(Invitation).where(*self._is_open()).order_by(Invitation.id))
            return [_shown(session, row) for row in rows]

    def revoke_invitation(self, by: Account, invitation_id: int) -> None:
        """The link is void from now on. Administrators only."""
        require_admin(by)
        with self._database.write() as session:
            invitation = find(session, Invitation, invitation_id)
            if invitation is not None and invitation.used_at is None:
                invitation.revoked_at = self._clock()

    def accept(self, token: str, name: str, password: str) -> Account:
        """Use an invitation: make the account `name`, or (a reset) give the invitation's account the new password.

        Raises: NotFound for a void token, Invalid for an unfit name or password, Conflict for a name that is taken.
        """
        resets = self.invitation(token).resets
        name = normal_name(name) if resets is None else resets
        password_hash = self._hash(name, password)
        with self._database.write() as session:
            invitation = self._open_invitation(session, token, for_update=True)
            invitation.used_at = self._clock()
            if invitation.user_id is not None:
                user = _user(session, invitation.user_id)
                user.password_hash = password_hash
                self._end_sessions(session, user.id)
                return _account(user)
            user = User(
                name=name,
                pseudonym=f"person-{secrets.token_hex(5)}",
                role=invitation.role,
                password_hash=password_hash,
                is_active=True,
                created_at=self._clock(),
            )
            session.add(user)
            try:
                session.flush()
            except IntegrityError:
                raise Conflict(f"the name {name!r} is taken", "choose another one") from None
            return _account(user)

    # Sessions

    def sign_in(self, name: str, password: str, address: str) -> str:
        """A new session's token. `address`: where the request came from.

        Raises: NotSignedIn (the same whether name or password is wrong), TooManyAttempts.
        """
        name, address, now = _looked_up(name), address[:64], self._clock()
        with self._database.write() as session:
            _slow_down(session, name, address, now)
            # Counted before it is checked: guesses made at the same time count too.
            session.add(LoginFailure(name=name, address=address, at=now))
            user = session.scalar(select(User).where(User.name == name))
        is_right = self._verify(self._nobodys_hash if user is None else user.password_hash, password)
        if user is None or not is_right or not user.is_active:
            raise NotSignedIn("the name or the password is wrong", "ask an administrator for a new link if you forgot")
        token = secrets.token_urlsafe(32)
        with self._database.write() as session:
            session.execute(delete(LoginFailure).where(LoginFailure.name == name))
            session.add(
                LoginSession(
                    token_sha256=_sha256(token), user_id=user.id, created_at=now, expires_at=now + self._session_life
                )
            )
        return token

    def who(self, token: str) -> Account | None:
        """Whose session this is; None for one that is unknown, over or revoked, or whose account is inactive."""
        with self._database.read() as session:
            user = session.scalar(
                select(User)
                .join(LoginSession, LoginSession.user_id == User.id)
                .where(
                    LoginSession.token_sha256 == _sha256(token),
                    LoginSession.expires_at > self._clock(),
                    LoginSession.revoked_at.is_(None),
                    User.is_active,
                )
            )
            return None if user is None else _account(user)

    def sign_out(self, token: str) -> None:
        """The session is over."""
        with self._database.write() as session:
            session.execute(
                update(LoginSession)
                .where(LoginSession.token_sha256 == _sha256(token), LoginSession.revoked_at.is_(None))
                .values(revoked_at=self._clock())
            )

    def change_password(self, by: Account, old: str, new: str) -> None:
        """Set one's own password; ends all of one's sessions. Raises: Forbidden if `old` is not the password."""
        with self._database.read() as session:
            stored = _user(session, by.id).password_hash
        if not self._verify(stored, old):
            raise Forbidden("that is not your password")
        password_hash = self._hash(by.name, new)
        with self._database.write() as session:
            _user(session, by.id).password_hash = password_hash
            self._end_sessions(session, by.id)

    # Administration

    def accounts(self, by: Account) -> list[Account]:
        """All of them, by name. Administrators only."""
        require_admin(by)
        with self._database.read() as session:
            return [_account(user) for user in session.scalars(select(User).order_by(User.name))]

    def set_role(self, by: Account, user_id: int, role: Role) -> Account:
        """Administrators only; the last active administrator stays one (Conflict)."""
        require_admin(by)
        with self._database.write() as session:
            user = _user(session, user_id)
            if role != "admin":
                _keep_an_admin(session, user)
            user.role = role
            return _account(user)

    def set_active(self, by: Account, user_id: int, is_active: bool) -> Account:
        """Let somebody in or out; out ends their sessions and gives back their leases. As `set_role` otherwise."""
        require_admin(by)
        with self._database.write() as session:
            user = _user(session, user_id)
            if not is_active:
                _keep_an_admin(session, user)
                self._end_sessions(session, user.id)
                session.execute(
                    update(Assignment)
                    .where(Assignment.user_id == user.id, Assignment.state == "leased")
                    .values(lease_expires_at=self._clock())
                )
            user.is_active = is_active
            return _account(user)

    # Parts

    def _new_invitation(self, session: Session, role: Role, note: str, user_id: int | None, by: int | None) -> str:
        token, now = secrets.token_urlsafe(32), self._clock()
        session.add(
            Invitation(
                token_sha256=_sha256(token),
                role=role,
                note=note,
                user_id=user_id,
                created_by=by,
                created_at=now,
                expires_at=now + self._invitation_life,
            )
        )
        return token

    def _is_open(self) -> tuple[ColumnElement[bool], ...]:
        return (
            Invitation.used_at.is_(None),
            Invitation.revoked_at.is_(None),
            Invitation.expires_at > self._clock(),
        )

    def _open_invitation(self, session: Session, token: str, for_update: bool = False) -> Invitation:
        query = select(Invitation).where(Invitation.token_sha256 == _sha256(token), *self._is_open())
        invitation = session.scalar(query.with_for_update() if for_update else query)
        if invitation is None:
            raise NotFound("this link is used, too old or not one of ours", "ask an administrator for a new one")
        return invitation

    def _end_sessions(self, session: Session, user_id: int) -> None:
        session.execute(
            update(LoginSession)
            .where(LoginSession.user_id == user_id, LoginSession.revoked_at.is_(None))
            .values(revoked_at=self._clock())
        )

    def _hash(self, name: str, password: str) -> str:
        if not MIN_PASSWORD_CHARACTERS <= len(password) <= MAX_PASSWORD_CHARACTERS:
            raise Invalid(
                f"a password has {MIN_PASSWORD_CHARACTERS} to {MAX_PASSWORD_CHARACTERS} characters",
                "a few words that you can remember make a good one",
            )
        if password.strip().casefold() == name or len(set(password)) < 4:
            raise Invalid("that password is too easy to guess", "choose another one")
        with _HASHES_AT_ONCE:
            return self._hasher.hash(_password_bytes(password))

    def _verify(self, password_hash: str, password: str) -> bool:
        if len(password) > MAX_PASSWORD_CHARACTERS:
            return False
        with _HASHES_AT_ONCE:
            try:
                return self._hasher.verify(password_hash, _password_bytes(password))
            except VerifyMismatchError:
                return False


def require_admin(by: Account) -> None:
    """Raises: Forbidden for everybody else."""
    if by.role != "admin":
        raise Forbidden("only an administrator may do that")


def normal_name(name: str) -> str:
    """The one way in which a name is written. Raises: Invalid for what is no name."""
    normal = unicodedata.normalize("NFKC", name).strip().casefold()
    if not _NAME.fullmatch(normal):
        raise Invalid(
            f"{name[:64]!r} is not fit for a name", "use 2 to 64 letters, digits and . _ @ + -, without spaces"
        )
    return normal


def _looked_up(name: str) -> str:
    try:
        return normal_name(name)
    except Invalid:
        return ""  # nobody is called that


def _slow_down(session: Session, name: str, address: str, now: datetime) -> None:
    """Refuse an attempt that comes too soon after too many: the wait doubles from one second to fifteen minutes."""
    session.execute(delete(LoginFailure).where(LoginFailure.at < now - _REMEMBERED))
    for column, value, free in (
        (LoginFailure.name, name, FREE_ATTEMPTS),
        (LoginFailure.address, address, FREE_ATTEMPTS_OF_ADDRESS),
    ):
        times = session.scalars(select(LoginFailure.at).where(column == value).order_by(LoginFailure.at)).all()
        if len(times) >= free:
            wait = min(2.0 ** (len(times) - free), MAX_WAIT_SECONDS) - (now - times[-1]).total_seconds()
            if wait > 0:
                raise TooManyAttempts(math.ceil(wait))


def _keep_an_admin(session: Session, leaving: User) -> None:
    admins = session.scalars(
        select(User.id).where(User.role == "admin", User.is_active).order_by(User.id).with_for_update()
    ).all()
    if list(admins) == [leaving.id]:
        raise Conflict(f"{leaving.name} is the last administrator", "make somebody else one first")


def _user(session: Session, user_id: int) -> User:
    user = find(session, User, user_id)
    if user is None:
        raise NotFound("there is no such account")
    return user


def _account(user: User) -> Account:
    return Account(user.id, user.name, user.pseudonym, user.role, user.is_active)


def _shown(session: Session, row: Invitation) -> OpenInvitation:
    resets = None if row.user_id is None else _user(session, row.user_id).name
    return OpenInvitation(row.id, row.role, row.note, resets, row.expires_at)


def _sha256(token: str) -> str:
    """Tokens are 256 random bits, so a plain hash of them tells nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _password_bytes(password: str) -> bytes:
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")
