"""Members that are asked to go: their work is taken away while training goes on, then they leave.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from treefold.scheduler.chains import Chains
from treefold.scheduler.members import MemberState, Roster
from treefold.wire.exchange import Level, Note, Peer, Send
from treefold.wire.messages import Accepted, DrainRequest, LeaveAsked, Refused, Stop
from treefold.wire.words import Code, Outcome, Role


def begin(roster: Roster, chains: Chains, peer: Peer, message: DrainRequest) -> list[Send | Note]:
    """Somebody asks for a member, by its name, to be drained."""
    before = dict(chains.draining)
    answer = _answer(roster, chains, message)
    found: list[Send | Note] = [Send(peer, answer)]
    if isinstance(answer, Accepted) and answer.number not in before:
        found.append(Note(Level.INFO, f"{message.member} is to be drained, and leaves then"))
    return found


def _answer(roster: Roster, chains: Chains, message: DrainRequest) -> Accepted | Refused:
    live = roster.live()
    found = [state for state in live if state.name == message.member]
    if not found:
        names = ", ".join(state.name for state in live) or "nobody"
        text = f"there is no {message.member!r} in this cluster; there are {names}"
        return Refused(message.call, Code.NOT_MEMBER, text)
    who = found[0].member.incarnation
    if message.incarnation not in (0, who):
        text = f"{message.member} is incarnation {who}, and asked for by incarnation "
        return Refused(message.call, Code.NOT_MEMBER, f"{text}{message.incarnation}")
    if found[0].member.role is Role.SERVER and chains.holds(who):
        others = [s for s in live if s.member.role is Role.SERVER and s is not found[0]]
        if all(state.member.incarnation in chains.draining for state in others):
            text = f"no other server is there to take over the shards of {message.member}"
            return Refused(message.call, Code.NOT_MEMBER, text)
    chains.drain(who)
    return Accepted(message.call, who)


def farewell(state: MemberState, chains: Chains) -> Stop | LeaveAsked | None:
    """What a member that is being drained is told now, None if nothing yet."""
    who = state.member.incarnation
    if who not in chains.draining:
        return None
    if state.member.role is Role.WORKER:
        return LeaveAsked(who)
    if chains.holds(who):
        return None
    return Stop(Outcome.DRAINED, "this server was drained: others hold its shards")
