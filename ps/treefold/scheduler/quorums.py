"""Which slots are in a round that may go on without the last ones: one decision for all shards.

Part of `treefold.scheduler.core` in a file of its own; just as pure. A decision names slots that
every shard of every table has reported. It is written down before anybody hears of it, so that
another scheduler decides nothing else.
"""

from treefold.common.spec import Consistency
from treefold.scheduler.declared import Declared
from treefold.scheduler.eventlog import QUORUM
from treefold.scheduler.members import MemberState, Roster
from treefold.wire.decisions import QuorumDecision, QuorumReport
from treefold.wire.exchange import Level, Note, Send
from treefold.wire.membership import MS
from treefold.wire.words import Role

FIRST_MS = 1_000  # in the place of the time that it takes to get a quorum, until that is known
PAUSE_FACTOR = 4  # what takes longer than so many usual rounds says nothing of the next one
GRACE_MIN_NS = 1


class Quorums:
    """Reports of the round that is being collected, and the decision of the one before.

    Parameters
    ----------
    roster : Roster
        The members.
    declared : Declared
        The tables.

    Attributes
    ----------
    decided : QuorumDecision or None
        The newest decision.
    usual_ns : int
        How long it takes to get a quorum, from the decision before; smoothed, 0 if not known.
    missed : int
        Slots that were left out since the job began, as far as servers have said it.
    planned : int
        How far the job is in its plans, as a round of theirs.
    """

    def __init__(self, roster: Roster, declared: Declared) -> None:
        self.decided: QuorumDecision | None = None
        self.usual_ns = 0
        self.missed = self.planned = 0
        self._roster = roster
        self._declared = declared
        self._reports: dict[tuple[int, int], QuorumReport] = {}
        self._decided_ns: int | None = None
        self._closing: tuple[int, int] | None = None

    def forget(self) -> None:
        """The job goes back, and decides anew."""
        self.decided = self._decided_ns = self._closing = None
        self.missed = self.planned = 0
        self._reports.clear()

    def on_report(self, now_ns: int, state: MemberState, report: QuorumReport) -> list[Send | Note]:
        """A shard says which slots of a round it has; who should know a decision is told it."""
        decided = self.decided
        if decided is not None and report.round <= decided.round:
            return [Send(state.peer, decided)] if report.round == decided.round else []
        self._reports[report.table, report.shard] = report
        self.planned = max(self.planned, report.planned)
        self.missed = max(self.missed, report.missed)
        common, due = self._common(report.round)
        if len(common) < self._enough(due):
            return []
        if len(common) == due:
            return self._decide(now_ns, report.round, common, due)
        if self._closing is None:
            self._closing = now_ns + self._grace_ns(now_ns), report.round
        return self.on_time(now_ns)

    def on_time(self, now_ns: int) -> list[Send | Note]:
        """Close the round, if its time of grace is over."""
        if self._closing is None or now_ns < self._closing[0]:
            return []
        round_ = self._closing[1]
        common, due = self._common(round_)
        if len(common) < self._enough(due):  # a server was replaced and has less
            self._closing = None
            return []
        return self._decide(now_ns, round_, common, due)

    def deadlines_ns(self) -> list[int]:
        """When a round is to be closed."""
        return [] if self._closing is None else [self._closing[0]]

    def _common(self, round_: int) -> tuple[list[int], int]:
        """The slots that every shard has of a round, and how many there are to come."""
        shards = [
            (place.table, shard.shard)
            for place in self._declared.places
            if self._declared.tables[place.table].spec.is_quorum
            for shard in place.shards
        ]
        reports = [self._reports.get(key) for key in shards]
        known = [one for one in reports if one is not None and one.round == round_]
        if len(known) < len(shards) or not known:
            return [], 0
        common = set(known[0].slots).intersection(*(one.slots for one in known[1:]))
        return sorted(common), known[0].due

    def _rule(self) -> Consistency:
        tables = self._declared.tables
        return next(table.spec.consistency for table in tables if table.spec.is_quorum)

    def _enough(self, due: int) -> int:
        return max(1, min(self._rule().quorum, due))

    def _grace_ns(self, now_ns: int) -> int:
        """How long others are waited for; also takes in how long it took so far."""
        if self._decided_ns is not None:
            took_ns = now_ns - self._decided_ns
            if self.usual_ns:  # a pause of the script, as for an evaluation, is no round
                took_ns = min(took_ns, PAUSE_FACTOR * self.usual_ns)
            self.usual_ns = (3 * self.usual_ns + took_ns) // 4 if self.usual_ns else took_ns
        return max(GRACE_MIN_NS, int(self._rule().grace * (self.usual_ns or FIRST_MS * MS)))

    def _decide(self, now_ns: int, round_: int, slots: list[int], due: int) -> list[Send | Note]:
        if self._closing is None:  # all came before anybody had to be waited for
            self._grace_ns(now_ns)
        self.decided = QuorumDecision(round_, slots)
        self._decided_ns, self._closing = now_ns, None
        self.missed += due - len(slots)
        self._reports.clear()
        servers = self._roster.live(Role.SERVER)
        found: list[Send | Note] = [Send(state.peer, self.decided) for state in servers]
        if len(slots) < due:
            text = f"round {round_} went on without {due - len(slots)} of its {due} slots"
            found.append(Note(Level.INFO, text, QUORUM))
        return found
