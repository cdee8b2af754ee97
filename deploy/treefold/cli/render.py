"""``treefold render``: a cluster as the file of an engine, on standard output."""

import sys

from treefold.cli.flags import Parser
from treefold.common.config import KEYS
from treefold.launch.compose import CHOSEN_HERE, COMMAND, SECRET, Composition, render

DESCRIPTION = (
    "Print a Compose file for a cluster of --servers servers (default 2) and --workers workers "
    "(default 4) with --replicas copies of each shard (default 2, or 1 with one server). Other "
    "settings that are given become those of every container. With --keys, a folder as seen from "
    "the file, every container gets its role's key; with --metrics-token-file, likewise, members "
    "offer metrics to whoever has the token, and there is a profile with Prometheus."
)


def main(words: list[str]) -> int:
    """Print the file.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold render``.

    Returns
    -------
    int
        0.
    """
    shown = [key for key in KEYS if key not in CHOSEN_HERE or key in SECRET]
    parser = Parser("render", DESCRIPTION, shown)
    parser.add_argument("engine", choices=["compose"], help="whose file")
    parser.add_argument(
        "--image", default="", help="a finished image; by default it is built from this repository"
    )
    parser.epilog = (
        "After -- comes what each worker runs in the image; without it that is the image's own "
        f"example, {' '.join(COMMAND)}."
    )
    flags, command = _parted(words)
    options, loaded = parser.read(flags)
    if words and words[-1] == "--":
        parser.error("which command? after -- comes what each worker runs")
    wanted = Composition(loaded, tuple(command or COMMAND), options.image)
    sys.stdout.write(render(wanted))
    return 0


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first ``--``, and those after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
