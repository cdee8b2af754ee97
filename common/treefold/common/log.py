"""Log lines of a process: one handler, to standard error, with the member's name in front."""

import logging
import sys

ROOT = "treefold"


def logger(name: str) -> logging.Logger:
    """The logger of one member or module."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure(level: str, name: str) -> logging.Logger:
    """Send this process's records to standard error.

    Parameters
    ----------
    level : str
        ``debug``, ``info``, ``warning`` or ``error``.
    name : str
        Stands before every line, such as ``server``.

    Returns
    -------
    logging.Logger
    """
    root = logging.getLogger(ROOT)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"{name}: %(levelname)s %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    root.setLevel(level.upper())
    return logger(name)
