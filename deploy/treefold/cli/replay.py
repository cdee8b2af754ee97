"""``treefold replay``: step again what a job recorded, and compare with what it came to."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from treefold.cli.status import PIPED_WIDTH
from treefold.common.errors import ConfigError
from treefold.common.spec import TableSpec
from treefold.common.tape import TapeVersion

DESCRIPTION = (
    "Step everything again that servers recorded with --tape FILE, in the order in which they did, "
    "and compare with what they held in the end."
)


def main(words: list[str]) -> int:
    """Step a tape again.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold replay``.

    Returns
    -------
    int
        0, or 1 if a shard did not come to the same bits, or the tape does not go to the end.
    """
    options = _parser().parse_args(words)
    from treefold.server.replay import Replay, Tape, tensors  # noqa: PLC0415 # torch takes seconds

    target = None if options.export is None else Path(options.export)
    if target is not None and not target.absolute().parent.is_dir():
        raise ConfigError(f"cannot export to {target}: there is no folder {target.parent}")
    tape = Tape(options.tape)
    replays = {}
    rows = []
    is_same = True
    for (table, shard), track in sorted(tape.tracks.items()):
        replay = replays[table, shard] = Replay(track)
        name = track.spec.name
        for version in replay.run():
            if options.events and version in track.versions:
                _tell(track.spec, track.versions[version])
        verdicts = replay.verdicts()
        is_same &= all(verdicts)
        rows.append([name, str(shard), str(replay.begun), str(replay.version), _words(verdicts)])
    _console().print(_table(rows))
    for name in tape.full:
        sys.stdout.write(f"{name} was full: what came after is not in it\n")
    if target is not None:
        from safetensors.torch import save_file  # noqa: PLC0415 # as above

        found = tensors(replays)
        save_file(found, target)
        sys.stdout.write(f"{len(found)} tensors are in {target}\n")
    return 0 if is_same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="treefold replay", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("tape", metavar="FILE", help="as --tape of the job named it")
    parser.add_argument("--export", metavar="TARGET", help="write the last values as safetensors")
    text = "print whose contributions each version has"
    parser.add_argument("--events", action="store_true", help=text)
    return parser


def _tell(spec: TableSpec, version: TapeVersion) -> None:
    kinds = ("round", "slot") if spec.is_by_batch else ("level", "index")
    parts = [
        f"{kinds[0]} {one} {kinds[1]} {other} of worker {who}"
        for one, other, who in version.contributors
    ]
    where = f"{spec.name} shard {version.shard} version {version.version}"
    sys.stdout.write(f"{where}: {'; '.join(parts)}\n")


def _words(verdicts: list[bool]) -> str:
    if not verdicts:
        return "nothing to compare with: the tape has no end of it"
    count = len(verdicts)
    if all(verdicts):
        return f"the same bits as {count} server{'s' if count > 1 else ''} had"
    return f"NOT what {verdicts.count(False)} of {count} servers had"


def _table(rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("table", "shard", "from version", "to version", "compared"):
        table.add_column(column, justify="left" if column in ("table", "compared") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
