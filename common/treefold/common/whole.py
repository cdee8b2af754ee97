"""Files that are there whole, or as they were before."""

import os
from pathlib import Path


def write_whole(path: Path, body: bytes) -> None:
    """Write a file so that nobody ever finds half of it, whenever this process ends.

    Parameters
    ----------
    path : Path
        Where it goes. What is no file, such as a pipe, is written as it is.
    body : bytes
        What it has.

    Raises
    ------
    OSError
        It cannot be written; what was there before is still there.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(body)
        return
    target = path.resolve()  # a link stays one
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_bytes(body)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
