"""``treefold keys``: make, list, add, remove and change the keys of a cluster."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from treefold.common.errors import ConfigError
from treefold.transport.keys import (
    ALLOWED,
    OLD,
    SUFFIX,
    Entry,
    check_name,
    check_public,
    generate,
    read_allowed,
    read_key,
    write_allowed,
    write_key,
)
from treefold.wire.permissions import KeyRole

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIPTION = (
    "Keys of a cluster, in the folder DIR: init makes it with one key for each role, list says who "
    "is allowed, add makes one more key (or allows one that was made elsewhere, with --public), "
    "remove takes a key off the allow-list, rotate makes a new key in the place of an old one, "
    "which stays allowed as NAME-old until it is removed."
)
NAMED = ("add", "remove", "rotate")


def main(words: list[str]) -> int:
    """Make, list, add, remove or change keys.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold keys``.

    Returns
    -------
    int
        0.
    """
    options = _parser().parse_args(words)
    if (options.name is not None) != (options.action in NAMED):
        needed = "needs the NAME of a key" if options.action in NAMED else "takes no NAME"
        raise ConfigError(f"treefold keys {options.action} {needed}")
    given = [flag for flag in ("role", "public") if getattr(options, flag) is not None]
    if given and options.action != "add":
        raise ConfigError(f"--{given[0]} goes with treefold keys add")
    if options.name is not None:
        check_name(options.name)
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "init": _init,
        "list": _list,
        "add": _add,
        "remove": _remove,
        "rotate": _rotate,
    }
    try:
        actions[options.action](options)
    except OSError as error:
        raise ConfigError(f"{options.folder}: {error}") from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="treefold keys", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("action", choices=("init", "list", *NAMED), help="what to do")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the keys are")
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the key to add or change")
    parser.add_argument("--role", choices=list(KeyRole), help="what its holder is")
    parser.add_argument("--public", metavar="KEY", help="allow this public key; make none")
    return parser


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _init(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = [generate(role, role.value) for role in KeyRole]
    for key in keys:
        write_key(folder, key)
    write_allowed(folder, [key.entry for key in keys])
    _say(f"{folder} has a key for each role: {', '.join(KeyRole)}")
    _say(f"a machine needs {ALLOWED} and the {SUFFIX} files of the roles that run on it, no others")


def _list(options: argparse.Namespace) -> None:
    for entry in read_allowed(options.folder):
        file = options.folder / (entry.name + SUFFIX)
        has_secret = file.exists() and read_key(file).public == entry.public
        mark = "  (its secret key is here)" if has_secret else ""
        _say(f"{entry.role:9}  {entry.name:20}  {entry.public}{mark}")


def _add(options: argparse.Namespace) -> None:
    if options.role is None:
        raise ConfigError("which role? treefold keys add DIR NAME --role " + "|".join(KeyRole))
    folder: Path = options.folder
    entries, name, role = read_allowed(folder), options.name, KeyRole(options.role)
    if any(entry.name == name for entry in entries):
        raise ConfigError(f"{name} is on the allow-list already: treefold keys rotate, or remove")
    if options.public is not None:
        check_public(options.public)
        write_allowed(folder, [*entries, Entry(role, name, options.public)])
        _say(f"{name} may connect as {role}")
        return
    key = generate(role, name)
    path = write_key(folder, key)
    write_allowed(folder, [*entries, key.entry])
    _say(f"{name} may connect as {role}; its key is {path}, its public key {key.public}")


def _remove(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    entries = read_allowed(folder)
    kept = [entry for entry in entries if entry.name != options.name]
    if len(kept) == len(entries):
        names = ", ".join(entry.name for entry in entries)
        raise ConfigError(f"{options.name} is not on the allow-list; there are {names}")
    write_allowed(folder, kept)
    (folder / (options.name + SUFFIX)).unlink(missing_ok=True)
    _say(f"{options.name} may not connect any more")


def _rotate(options: argparse.Namespace) -> None:
    """Allow the new key before anybody has it; the old one until it is removed."""
    folder: Path = options.folder
    name, old_name = options.name, options.name + OLD
    check_name(old_name)
    entries = {entry.name: entry for entry in read_allowed(folder)}
    if name not in entries:
        raise ConfigError(f"{name} is not on the allow-list; there are {', '.join(entries)}")
    if old_name in entries:
        raise ConfigError(
            f"{name} was rotated before and its old key is still allowed; when nobody uses it any "
            f"more: treefold keys remove {folder} {old_name}"
        )
    old = entries.pop(name)
    key = generate(old.role, name)
    others = [*entries.values(), Entry(old.role, old_name, old.public)]
    write_allowed(folder, [key.entry, *others])
    write_key(folder, key, is_replacing=True)
    _say(f"{name} has a new key, {key.public}; the old one is allowed as {old_name} until")
    _say(f"  treefold keys remove {folder} {old_name}")
