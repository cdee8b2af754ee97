"""``treefold checkpoint``: what is in a folder of checkpoints, and is it what was saved."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from treefold.checkpoint.store import Store
from treefold.cli.contents import print_inspection, print_list, size_of
from treefold.cli.status import PIPED_WIDTH
from treefold.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from treefold.checkpoint.manifest import Manifest

DESCRIPTION = (
    "Look into FOLDER, a path or an address as fsspec writes it: ls lists its checkpoints, inspect "
    "says what is in one, verify reads every file and compares it with what was saved, export "
    "writes a model's state dict to TARGET."
)
ACTIONS = ("ls", "inspect", "verify", "export")
FORMATS = ("torch", "safetensors")


def main(words: list[str]) -> int:
    """Look into a folder of checkpoints.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold checkpoint``.

    Returns
    -------
    int
        0, or 1 if a checkpoint was found to be damaged.
    """
    options = _parser().parse_args(words)
    if (options.target is not None) != (options.action == "export"):
        needed = "needs a TARGET" if options.action == "export" else "takes no TARGET"
        raise ConfigError(f"treefold checkpoint {options.action} {needed}")
    store = Store(options.folder)
    try:
        versions = store.versions()
    except OSError as error:
        raise ConfigError(f"{options.folder} cannot be read: {error}") from error
    if options.version is not None:
        versions = [version for version in versions if version == options.version]
    if not versions:
        which = "" if options.version is None else f" of version {options.version}"
        raise ConfigError(f"there is no checkpoint{which} in {options.folder}")
    match options.action:
        case "ls":
            print_list(_manifests(store, versions), _console())
        case "inspect":
            print_inspection(store.manifest(versions[0]), _console())
        case "verify":
            return _verify(store, versions)
        case _:
            _export(store, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="treefold checkpoint", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("folder", metavar="FOLDER", help="where the checkpoints are")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="the file to export to")
    version = "this checkpoint (inspect, export: the newest one; ls, verify: all)"
    parser.add_argument("--version", type=int, metavar="N", help=version)
    text = "of the exported file (default torch)"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=text)
    return parser


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def _manifests(store: Store, versions: list[int]) -> "list[tuple[int, Manifest | CheckpointError]]":
    found: list[tuple[int, Manifest | CheckpointError]] = []
    for version in versions:
        try:
            found.append((version, store.manifest(version)))
        except CheckpointError as error:
            found.append((version, error))
    return found


def _verify(store: Store, versions: list[int]) -> int:
    damaged = 0
    for version in versions:
        try:
            manifest = store.verify(version)
            files = sum(len(table.files) for table in manifest.tables)
            text = f"whole: {files} files, {size_of(manifest.nbytes)}"
        except CheckpointError as error:
            damaged += 1
            text = f"damaged: {error}"
        sys.stdout.write(f"{version:08d}  {text}\n")
        sys.stdout.flush()
    return 1 if damaged else 0


def _export(store: Store, options: argparse.Namespace) -> None:
    from treefold.checkpoint.export import export, left_out  # noqa: PLC0415 - torch takes seconds

    if options.version is not None:
        manifest = store.manifest(options.version)
    else:
        newest = store.newest_whole(lambda text: _warn(f"{text}\n"))
        if newest is None:
            raise CheckpointError(options.folder, "no checkpoint in it is whole")
        manifest = newest
    count = export(store, manifest, Path(options.target), options.format)
    for name in left_out(manifest):
        _warn(f"{name} is not in it: its values were too large to be kept, and it never changed\n")
    sys.stdout.write(f"{count} tensors of round {manifest.version} are in {options.target}\n")


def _warn(text: str) -> None:
    sys.stderr.write(f"treefold checkpoint: {text}")
