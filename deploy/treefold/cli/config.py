"""``treefold config show``: every setting and where its value comes from."""

import sys

import msgspec

from treefold.cli.flags import Parser

DESCRIPTION = "Show every setting as a process started here and now would have it."


def main(words: list[str]) -> int:
    """Print the settings.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold config``.

    Returns
    -------
    int
        0.
    """
    parser = Parser("config", DESCRIPTION)
    parser.add_argument("action", choices=["show"], help="what to do with the settings")
    parser.add_argument("--origin", action="store_true", help="say where each value comes from")
    options, loaded = parser.read(words)
    for key, value in msgspec.to_builtins(loaded.settings).items():
        text = msgspec.json.encode(value).decode()  # TOML writes these values in the same way
        origin = f"  # {loaded.origins[key]}" if options.origin else ""
        sys.stdout.write(f"{key} = {text}{origin}\n")
    return 0
