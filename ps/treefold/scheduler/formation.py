"""Whether everybody is there, and who is not."""

from collections.abc import Mapping

from treefold.scheduler.members import Roster
from treefold.wire.words import Role


def missing(roster: Roster, wanted: Mapping[Role, int]) -> dict[Role, int]:
    """How many of each role have not registered, for the roles that lack any."""
    lacking = {role: count - len(roster.live(role)) for role, count in wanted.items()}
    return {role: count for role, count in lacking.items() if count > 0}


def missing_text(roster: Roster, wanted: Mapping[Role, int], waited_ns: int) -> str:
    """The same in words, with the names of those who are missing."""
    lacking = missing(roster, wanted)
    counts = ", ".join(
        f"{count - lacking.get(role, 0)} of {count} {role.name.lower()}s registered"
        for role, count in wanted.items()
    )
    names = []
    for role in lacking:
        there = [state.member.rank for state in roster.live(role)]
        names += [f"{role.name.lower()}-{n}" for n in range(wanted[role]) if n not in there]
    waited = f"within {waited_ns / 1e9:.0f} s"
    return f"the cluster did not form {waited}: {counts}; missing: {', '.join(names)}"
