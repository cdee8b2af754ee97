"""Flags from settings: every key of `Settings` is one, with its help, default and variable."""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from treefold.common.config import KEYS, PREFIX, Loaded, Settings, load
from treefold.common.errors import ConfigError

WIDTH = 100


class Parser(argparse.ArgumentParser):
    """A parser whose flags are settings.

    Parameters
    ----------
    command : str
        The subcommand, such as ``run``.
    description : str
        What it does; shown by ``--help``.
    keys : sequence of str
        Settings that may be given as flags.
    """

    def __init__(self, command: str, description: str, keys: Sequence[str] = KEYS) -> None:
        super().__init__(
            prog=f"treefold {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=WIDTH),
        )
        self._keys = list(keys)
        group = self.add_argument_group(
            "settings", "also from the environment, or treefold.toml; docs/config.md says more"
        )
        group.add_argument("--config", metavar="FILE", help="read this file, not ./treefold.toml")
        texts, defaults = setting_texts(), msgspec.to_builtins(Settings())
        for key in self._keys:
            add_setting(group, key, texts[key], defaults[key])

    def read(self, words: list[str], role: str = "") -> tuple[argparse.Namespace, Loaded]:
        """Parse a command line and gather the settings of this process.

        Parameters
        ----------
        words : list of str
            What follows the subcommand.
        role : str
            What this process becomes, if an engine may say where its scheduler is.

        Returns
        -------
        (Namespace, Loaded)
            Flags that are no settings, and the settings.

        Raises
        ------
        ConfigError
            A setting is wrong.
        SystemExit
            The command line is, or it asked for help.
        """
        options, unknown = self.parse_known_args(words)
        if unknown:
            self.refuse(unknown[0])
        given = {key: getattr(options, key) for key in self._keys}
        return options, load(given, options.config, role)

    def refuse(self, word: str) -> NoReturn:
        """End with a word about an unknown flag, and the nearest right one."""
        flag = word.partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help names all flags"
        self.error(f"unknown argument {flag}{hint}")

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        sys.stderr.write(f"{self.prog}: {message}\n")
        sys.exit(2)


def check_scheduler(settings: Settings, role: str) -> None:
    """Refuse to start a member that has nobody to register with.

    Raises
    ------
    ConfigError
        No scheduler's address is set.
    """
    if not settings.scheduler:
        msg = f"a {role} needs its scheduler's address: --scheduler ADDRESS or TREEFOLD_SCHEDULER"
        raise ConfigError(msg)


def setting_texts() -> dict[str, str]:
    """What each key of the settings does, from the docstring of `Settings`."""
    text = inspect.getdoc(Settings) or ""
    found = re.findall(r"^(\w[\w, ]*) : .*\n((?:    .*\n?)+)", text, re.MULTILINE)
    texts = dict.fromkeys(KEYS, "")
    for names, body in found:
        words = " ".join(body.split()).rstrip(".")
        texts |= dict.fromkeys(names.split(", "), words)
    return texts


def add_setting(group: argparse._ArgumentGroup, key: str, text: str, default: object) -> None:
    """Add the flag of one setting; its value is checked with all others, by `load`."""
    flag, variable = f"--{key.replace('_', '-')}", PREFIX + key.upper()
    shown = str(default).lower() if isinstance(default, bool) else default
    words = f"{text} (default {shown}; {variable})" if shown != "" else f"{text} ({variable})"
    words = words.replace("%", "%%").replace("``", "")
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=words)
    else:
        group.add_argument(flag, default=None, metavar=metavar_of(default), help=words)


def metavar_of(default: object) -> str:
    """What stands for a value in the help."""
    return {int: "N", float: "S"}.get(type(default), "TEXT")
