"""First program of every process of `treefold run`: tell the guard, then become the command.

Run by its path in an interpreter without site packages, so it imports the standard library only.
The process leads a session of its own; its number is written to the guard's pipe before the command
begins, so there is no moment at which the guard does not know of a running command.
"""

import os
import sys

NOT_STARTED = 127  # as shells say that a command could not be run


def main(arguments: list[str]) -> int:
    """Register with the guard and become the command.

    Parameters
    ----------
    arguments : list of str
        Descriptor of the guard's pipe, then the command.

    Returns
    -------
    int
        `NOT_STARTED`; a command that could be started never returns here.
    """
    pipe, command = int(arguments[0]), arguments[1:]
    os.write(pipe, f"+{os.getpid()}\n".encode())
    os.close(pipe)
    try:
        os.execvp(command[0], command)  # noqa: S606 # no shell is the point
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error.strerror}\n")
    return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
