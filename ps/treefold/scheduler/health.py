"""What counts of the contributions to a table that looks at them: one decision for all shards.

Part of `treefold.scheduler.core` in a file of its own; just as pure. A decision follows from what
the shards report and from the rules of the table alone. The newest of each table is written down
before anybody hears of it, for servers that did not hear of it when others went on already.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from treefold.common import blocks
from treefold.common.layout import Layout
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import TableSpec
from treefold.scheduler.declared import Declared
from treefold.scheduler.members import MemberState, Roster
from treefold.scheduler.robust import Band, Fault, Verdict, band_of, judge, logarithms, remembered
from treefold.wire.decisions import HealthDecision, HealthReport
from treefold.wire.exchange import Level, Note, Send

NOTED_MAX = 8  # findings of one kind that are all noted; of later ones those of a power of two


@dataclass(slots=True)
class Tally:
    """What was found of one table since this scheduler began.

    Attributes
    ----------
    faults : dict of worker to dict of reason to int
        Contributions that were not healthy.
    left_out : dict of reason to int
        Those of them that did not count.
    skipped : int
        Rounds that changed nothing.
    short : int
        Those of them that had too few contributions for their rule.
    band : (float, float) or None
        The norms that were usual in the newest round.
    last : str
        The newest finding, in words.
    """

    faults: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    short: int = 0
    band: tuple[float, float] | None = None
    last: str = ""


class Health:
    """Reports of rounds that are being collected, and the newest decision of each table.

    Parameters
    ----------
    roster : Roster
        The members.
    declared : Declared
        The tables.

    Attributes
    ----------
    decided : dict of int to HealthDecision
        By table.
    tallies : dict of int to Tally
        By table.
    """

    def __init__(self, roster: Roster, declared: Declared) -> None:
        self.decided: dict[int, HealthDecision] = {}
        self.tallies: dict[int, Tally] = {}
        self._roster = roster
        self._declared = declared
        self._reports: dict[tuple[int, int], dict[int, HealthReport]] = {}
        self._watched: dict[int, tuple[int, list[float]]] = {}
        self._blocks: dict[int, int] = {}

    def forget(self) -> None:
        """The job goes back, and decides anew."""
        self.decided.clear()
        self._reports.clear()
        self._watched.clear()

    def on_report(self, state: MemberState, report: HealthReport) -> list[Send | Note]:
        """A shard says how large contributions are; who should know a decision is told it."""
        tables, decided = self._declared.tables, self.decided.get(report.table)
        place = tables[report.table].place if report.table < len(tables) else None
        if place is None or not tables[report.table].spec.is_guarded:
            return []
        if decided is not None and report.round <= decided.round:
            return [Send(state.peer, decided)] if report.round == decided.round else []
        key = report.table, report.round
        current = self._reports.get(key, {})
        if not _is_sound(tables[report.table].spec, report, current.values()):
            what = f"{state.name} reports of table {report.table} round {report.round}"
            return [Note(Level.WARNING, f"{what} other numbers than there are slots: ignored")]
        self._reports[key] = current
        current[report.shard] = report
        if len(current) < len(place.shards):
            return []
        for old in [one for one in self._reports if one[0] == key[0] and one[1] <= key[1]]:
            del self._reports[old]
        nodes = [node for one in current.values() for node in one.sums]
        if report.table not in self._blocks:
            self._blocks[report.table] = Layout(tables[report.table].spec).blocks
        sums = blocks.of_table(self._blocks[report.table], nodes)
        if sums is None:
            text = f"table {report.table} round {report.round}: reports do not make up the table"
            return [Note(Level.ERROR, text)]
        if tables[report.table].spec.is_watched:
            return [*self._watch(report, sums)]
        found = self._decide(report, sums)
        servers = {shard.server: None for shard in place.shards}
        peers = [self._roster.by_incarnation[who].peer for who in servers]
        return [*found, *(Send(peer, self.decided[report.table]) for peer in peers)]

    def _watch(self, report: HealthReport, sums: blocks.Row) -> list[Note]:
        """Say what is not usual, where everything counts as it is."""
        plans = self._declared.plans.values()
        plan = next((one for one in plans if _is_of(one, report.round)), None)
        newest, known = self._watched.get(report.table, (-1, []))
        if plan is None or report.round <= newest:
            return []
        samples = [plan.slot_samples(report.round, slot) for slot in range(len(sums))]
        whole = msgspec.structs.replace(
            report, samples=samples, total=plan.round_samples(report.round), norms=known
        )
        found = self._decide(whole, sums)
        self._watched[report.table] = report.round, self.decided.pop(report.table).norms
        return found

    def _decide(self, report: HealthReport, sums: blocks.Row) -> list[Note]:
        spec = self._declared.tables[report.table].spec
        shares = [samples / report.total for samples in report.samples]
        verdict = judge(spec.guard, report.norms, sums, shares)
        slots, is_paired = len(shares), spec.guard.aggregation.is_paired
        squares = sums[:slots]
        if is_paired:
            squares = [sums[one * slots - one * (one - 1) // 2] for one in range(slots)]
        norms = logarithms(squares, shares)
        kept = remembered(spec.guard, report.norms, norms)
        of = report.table, report.round
        self.decided[report.table] = HealthDecision(*of, verdict.coefficients, verdict.factor, kept)
        return self._noted(report, verdict, norms)

    def status_of(self, number: int, spec: TableSpec) -> dict[str, object]:
        """What ``treefold status`` says of a table."""
        tally = self.tallies.get(number, Tally())
        return {
            "health": spec.guard.policy.name.lower().replace("_", "-"),
            "aggregation": spec.guard.aggregation.name.lower().replace("_", "-"),
            "unhealthy": tally.faults,
            "rounds_skipped": tally.skipped,
            "usual": tally.band,
            "finding": tally.last,
        }

    # ---- who it was -----------------------------------------------------------------------------

    def _noted(self, report: HealthReport, verdict: Verdict, norms: list[float]) -> list[Note]:
        """Count what was found, and say whose it was."""
        spec = self._declared.tables[report.table].spec
        where = f"table {spec.name!r} round {report.round}"
        tally = self.tallies.setdefault(report.table, Tally())
        band = band_of(spec.guard, report.norms)
        tally.band = None if band is None else (math.exp(band.low), math.exp(band.high))
        tally.skipped += verdict.is_skipped
        found: list[Note] = []
        for slot, fault in verdict.faults.items():
            who = self._roster.by_incarnation.get(report.senders[slot])
            name = str(report.senders[slot]) if who is None else who.name
            counts = tally.faults.setdefault(name, {})
            counts[fault.value] = counts.get(fault.value, 0) + 1
            if fault is Fault.LOW:
                continue
            if not verdict.coefficients[slot]:
                tally.left_out[fault.value] = tally.left_out.get(fault.value, 0) + 1
            what = _text(fault, norms[slot], band)
            tally.last = f"{where}: slot {slot} of {name} {what}; {_done(verdict, slot)}"
            count = sum(counts.get(one.value, 0) for one in (Fault.NONFINITE, Fault.HIGH))
            found += _often(tally.last, count, "worker")
        if verdict.is_skipped and not verdict.faults:
            tally.last = f"{where}: too few contributions for its aggregation; it is skipped"
            tally.short += 1
            found += _often(tally.last, tally.short, "table")
        return found


def _often(text: str, count: int, whose: str) -> list[Note]:
    """A line that is not written every time, if it is now."""
    if count > NOTED_MAX and count & (count - 1):
        return []
    often = "" if count <= NOTED_MAX else f" (number {count} of this {whose})"
    return [Note(Level.WARNING, f"{text}{often}")]


def _is_of(plan: LoopPlan, round_: int) -> bool:
    return plan.kind is PlanKind.LOADER or plan.first_round <= round_ < plan.end_round


def _text(fault: Fault, norm: float, band: Band | None) -> str:
    """What is wrong with a contribution, in words."""
    if fault is Fault.NONFINITE or band is None:
        return "has a gradient that is not finite"
    usual = f"{math.exp(band.low):.3g} to {math.exp(band.high):.3g}"
    return f"has a gradient of norm {math.exp(norm):.3g}, usual are {usual}"


def _done(verdict: Verdict, slot: int) -> str:
    """What was done about it, in words."""
    if verdict.is_skipped:
        return "the round is skipped"
    count = verdict.coefficients[slot]
    return "left out" if not count else "counted as it is" if count == 1.0 else "clipped"


def _is_sound(spec: TableSpec, report: HealthReport, others: Iterable[HealthReport]) -> bool:
    """Whether there are as many numbers in a report as there are slots, as in those of others."""
    slots = len(report.senders)
    sums = slots * (slots + 1) // 2 if spec.guard.aggregation.is_paired else slots
    samples = (0, slots) if spec.is_watched else (slots,)
    return (
        len(report.samples) in samples
        and all(len(row) == sums for _, _, row in report.sums)
        and all(len(one.senders) == slots for one in others)
    )
