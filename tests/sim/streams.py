"""What a simulated worker has of a version that it computes with already."""

from dataclasses import dataclass, field

from tests.sim.memory import Memory


@dataclass(slots=True)
class Streamed:
    """One version of one table, part by part.

    Attributes
    ----------
    parts : dict of int to Memory
        Those that have come.
    read : dict of int to None
        Those that the script has read.
    is_void : bool
        Whether what is computed with it does not count; ``is_torn`` if memory was overwritten.
    """

    table: int
    version: int
    parts: dict[int, Memory] = field(default_factory=dict)
    read: dict[int, None] = field(default_factory=dict)
    is_void: bool = False
    is_torn: bool = False
    error: Exception | None = None
