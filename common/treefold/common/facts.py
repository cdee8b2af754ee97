"""What there is to tell of where a process runs. Nothing is decided by it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a member tells the scheduler of where it runs, for those who look for what is wrong.

    Attributes
    ----------
    package, python, torch : str
        Versions.
    files_max : int
        How many files it may have open.
    memory_free_bytes : int
        What is left, for segments of shared memory as well.
    wall_lead_ns : int
        What the system's clock shows more than the monotonic one. Nothing is decided by it.
    """

    package: str
    python: str
    torch: str
    files_max: int
    memory_free_bytes: int
    wall_lead_ns: int
