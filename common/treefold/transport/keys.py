"""Key files and the allow-list: what ``treefold keys`` writes and every process reads.

A folder of keys has a file ``NAME.key`` per secret key, for its owner alone, and ``allowed``: a
line per public key with its role and its name. Nothing here opens a socket.
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import zmq

from treefold.common.errors import ConfigError
from treefold.wire.permissions import KeyRole

ALLOWED = "allowed"
SUFFIX = ".key"
OLD = "-old"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PUBLIC = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85, 32 bytes
FILE_BYTES_MAX = 1 << 20
HEAD = (
    "# Who may connect: ROLE NAME PUBLIC-KEY. Made by `treefold keys`; processes that run take in\n"
    "# what changes here.\n"
)


class Entry(msgspec.Struct, frozen=True):
    """A public key that is allowed, and as what."""

    role: KeyRole
    name: str
    public: str


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key pair; keys are in Z85, 40 characters."""

    role: KeyRole
    name: str
    public: str
    secret: str

    def __repr__(self) -> str:
        """Without the secret, which belongs into no log."""
        return f"Key({self.role}, {self.name}, {self.public})"

    @property
    def entry(self) -> Entry:
        """What others may know of it."""
        return Entry(self.role, self.name, self.public)


def generate(role: KeyRole, name: str) -> Key:
    """Make a new key pair.

    Raises
    ------
    ConfigError
        The name cannot be that of a file.
    """
    check_name(name)
    public, secret = zmq.curve_keypair()
    return Key(role, name, public.decode(), secret.decode())


def check_name(name: str) -> None:
    """Refuse a name that could be a path, or does not fit into a line."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"a key cannot be called {name!r}: up to 64 letters, digits and . _ - begin with a "
            "letter or digit"
        )


def check_public(text: str) -> None:
    """Refuse what is no public key."""
    if not PUBLIC.fullmatch(text):
        raise ConfigError(f"{text!r} is no public key: one has 40 characters of Z85")


# ---- secret keys ---------------------------------------------------------------------------------


def write_key(folder: Path, key: Key, *, is_replacing: bool = False) -> Path:
    """Write a key pair to its file, readable for this user alone.

    Raises
    ------
    ConfigError
        There is one already and it is not to be replaced.
    """
    target = folder / (key.name + SUFFIX)
    if target.exists() and not is_replacing:
        raise ConfigError(f"{target} exists; choose another name, or: treefold keys rotate")
    fields = msgspec.to_builtins(key)
    lines = [f"{field} = '{value}'\n" for field, value in fields.items()]  # no key has a quote
    text = "# A secret key of treefold: for its owner alone.\n" + "".join(lines)
    _replace(target, text, 0o600)
    return target


def read_key(path: Path) -> Key:
    """Read a key pair.

    Raises
    ------
    ConfigError
        It cannot be read, others can read it, or it is no key pair.
    """
    mode = _mode(path)
    if mode & 0o077:
        raise ConfigError(
            f"{path} is a secret key that others on this machine can read or write (mode "
            f"{stat.S_IMODE(mode):04o}): chmod 600 {path}; if it may have been read: treefold "
            f"keys rotate {path.parent} {path.name.removesuffix(SUFFIX)}"
        )
    try:
        key = msgspec.convert(tomllib.loads(_text(path)), Key)
        derived = zmq.curve_public(key.secret.encode()).decode()
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError, zmq.ZMQError) as error:
        raise ConfigError(f"{path} is no key file: {type(error).__name__}") from None
    if derived != key.public:
        raise ConfigError(f"{path} is no key file: its public key belongs to another secret one")
    return key


def own_key(folder: str, roles: Sequence[KeyRole]) -> Key:
    """The secret key in a folder that a process of one of these roles uses.

    Parameters
    ----------
    folder : str
        Of keys.
    roles : sequence of KeyRole
        The first one of which there is a key counts: ``ROLE.key``, or else the only key with it.

    Raises
    ------
    ConfigError
        There is none, or there are several.
    """
    place = Path(folder)
    files = sorted(place.glob(f"*{SUFFIX}"))
    for role in roles:
        usual = place / f"{role}{SUFFIX}"
        if usual in files:
            key = read_key(usual)
            if key.role is not role:
                raise ConfigError(f"{usual} has a key with the role {key.role}, not {role}")
            return key
    # A process may be allowed to read its own key alone: others are looked at only if need be.
    found = [read_key(file) for file in files if os.access(file, os.R_OK)]
    for role in roles:
        mine = [key for key in found if key.role is role]
        if len(mine) > 1:
            names = ", ".join(key.name + SUFFIX for key in mine)
            raise ConfigError(f"which of {names} in {folder}? call the one to use {role}{SUFFIX}")
        if mine:
            return mine[0]
    wanted = " or ".join(f"{role}{SUFFIX}" for role in roles)
    raise ConfigError(
        f"there is no {wanted} in {folder}: copy it there from where the cluster's keys were made, "
        "or make new ones with: treefold keys init DIR"
    )


# ---- the allow-list ------------------------------------------------------------------------------


def read_allowed(folder: Path) -> list[Entry]:
    """Read the allow-list of a folder.

    Raises
    ------
    ConfigError
        It cannot be read, others than its owner can write it, or a line is wrong.
    """
    path = folder / ALLOWED
    mode = _mode(path)
    if mode & 0o022:
        raise ConfigError(
            f"{path} says who may connect, and others can write it (mode "
            f"{stat.S_IMODE(mode):04o}): chmod 644 {path}"
        )
    entries: list[Entry] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                entries.append(_entry(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
    return checked(entries)


def write_allowed(folder: Path, entries: Iterable[Entry]) -> None:
    """Replace the allow-list of a folder."""
    lines = [f"{entry.role} {entry.name} {entry.public}\n" for entry in checked(list(entries))]
    _replace(folder / ALLOWED, HEAD + "".join(lines), 0o644)


def checked(entries: list[Entry]) -> list[Entry]:
    """These entries, if no name and no key is there twice.

    Raises
    ------
    ConfigError
        One is.
    """
    for what in ("name", "public"):
        seen: dict[str, None] = {}
        for entry in entries:
            value: str = getattr(entry, what)
            if value in seen:
                raise ConfigError(f"{value} is twice in the allow-list")
            seen[value] = None
    return entries


def _entry(line: str) -> Entry:
    words = line.split()
    if len(words) != 3:
        raise ConfigError(f"expected ROLE NAME PUBLIC-KEY, got {len(words)} words")
    role, name, public = words
    if role not in list(KeyRole):
        raise ConfigError(f"{role!r} is no role; there are {', '.join(KeyRole)}")
    check_name(name)
    check_public(public)
    return Entry(KeyRole(role), name, public)


# ---- files ---------------------------------------------------------------------------------------


def _mode(path: Path) -> int:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is no file")
    return mode


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            body = file.read(FILE_BYTES_MAX + 1)
        if len(body) > FILE_BYTES_MAX:
            raise ConfigError(f"{path} has more than {FILE_BYTES_MAX} bytes")
        return body.decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text") from None


def _replace(target: Path, text: str, mode: int) -> None:
    """Write a file so that it is there whole or not at all, and never with a wider mode."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
