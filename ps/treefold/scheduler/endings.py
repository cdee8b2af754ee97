"""How members and the job come to an end, and how the job goes back to a checkpoint instead.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from treefold.scheduler.effects import CheckpointChosen
from treefold.scheduler.members import Happening, MemberState
from treefold.scheduler.norms import NormBook
from treefold.wire.exchange import Send
from treefold.wire.messages import Leave, Stop
from treefold.wire.words import Leases, Outcome, Phase, Role

if TYPE_CHECKING:
    from treefold.scheduler.core import SchedulerCore


class Endings:
    """What the end of a member means for the others.

    Parameters
    ----------
    core : SchedulerCore
        That this is part of.
    """

    def __init__(self, core: "SchedulerCore") -> None:
        self._core = core

    def on_leave(self, now_ns: int, state: MemberState, message: Leave) -> None:
        """A member says farewell."""
        core = self._core
        was_live = state.is_live
        core.roster.part(state, Happening.FAREWELL, message.outcome)
        if was_live:
            self.on_gone(now_ns, state, message.outcome, message.text)
        elif message.outcome is Outcome.DONE and not core.roster.live(Role.WORKER):
            self.end(now_ns, Outcome.DONE, "the job is done")
        core.out.append(Send(state.peer, core.ending or Stop(message.outcome, "you have left")))

    def on_gone(self, now_ns: int, state: MemberState, outcome: Outcome | None, text: str) -> None:
        """A member is gone: it said farewell with ``outcome``, or fell silent (None)."""
        core = self._core
        why = gone_text(now_ns, state, outcome, text)
        if core.phase is Phase.ENDED:
            core.note(now_ns, why)
            return
        if state.member.role is Role.SERVER:
            how = (text or "fell silent") if outcome is None else f"left ({text})"
            held = core.chains.holds(state.member.incarnation)
            lacking = f"; {held} shards lack one of their servers" if held else ""
            core.note(now_ns, why + lacking)
            core.chains.mend(core.view.number + 1)
            if core.chains.lost:
                lost = core.chains.lost_text()
                self.on_lost(now_ns, f"{state.name} {how} and its {held} shards with it: {lost}")
                return
        elif not core.roster.live(Role.WORKER):
            core.note(now_ns, why)
            self._on_last_worker(now_ns, state, outcome, text)
            return
        elif core.declared.is_loader and outcome is not Outcome.DONE:
            core.note(now_ns, why)
            who = f"{state.name}, one slot with its own loader,"
            self.end(now_ns, Outcome.FAILED, f"{who} is gone: {text or 'fell silent'}")
            return
        else:
            core.new_view(now_ns, why=why)
            core.place_tables(now_ns)
            return
        core.place_tables(now_ns)
        core.new_view(now_ns)

    def _on_last_worker(
        self, now_ns: int, state: MemberState, outcome: Outcome | None, text: str
    ) -> None:
        core = self._core
        is_done, patience_ns = core.roster.is_done, core.limits.dead_after_ns
        if is_done and not core.roster.is_awaited(now_ns, 2 * patience_ns):
            self.end(now_ns, Outcome.DONE, "the job is done")
        elif outcome is Outcome.FAILED and not core.limits.is_restarting and not is_done:
            self.end(now_ns, Outcome.FAILED, f"{state.name} failed and no worker is left: {text}")
        else:
            is_anew = core.rollback.count > 0
            core.solitude.begin(now_ns, core.limits, is_done=is_done, is_anew=is_anew)
            core.new_view(now_ns)

    def on_lost(self, now_ns: int, text: str) -> None:
        """Nobody holds some shards any more: back to a checkpoint, or to the start."""
        core = self._core
        if core.roster.is_done and not core.roster.live(Role.WORKER):
            self.end(now_ns, Outcome.DONE, "the job is done")
            return
        if not core.checkpoints.is_any and not core.limits.checkpoint:
            self.end(now_ns, Outcome.FAILED, text)
            return
        core.out += core.rollback.begin(text)
        core.phase, core.forming_ns = Phase.FORMING, now_ns
        core.norms = NormBook()
        core.quorums.forget()
        core.health.forget()
        core.solitude.end()
        none, era = Leases(0, []), core.view.number + 1
        core.view = replace(core.view, leases=none, previous=none, era=era)
        core.new_view(now_ns)

    def on_chosen(self, now_ns: int, event: CheckpointChosen) -> None:
        """It is known what the job goes back to."""
        core = self._core
        effects = core.rollback.choose(event)
        if effects is None:
            self.end(now_ns, Outcome.FAILED, "no checkpoint is whole that the job could go back to")
            return
        core.out += effects
        core.form(now_ns)
        core.new_view(now_ns)

    def end(self, now_ns: int, outcome: Outcome, text: str) -> None:
        """The job ends for everybody."""
        core = self._core
        if core.phase is Phase.ENDED:
            return
        core.phase = Phase.ENDED
        core.ending = Stop(outcome, text)
        core.farewell.begin(now_ns)
        core.note(now_ns, f"the job has ended: {outcome.name.lower()}, {text}")
        core.new_view(now_ns)
        for state in core.roster.live():
            core.out.append(Send(state.peer, core.ending))


def gone_text(now_ns: int, state: MemberState, outcome: Outcome | None, text: str) -> str:
    """How a member went, in words: with ``outcome``, or without a farewell (None)."""
    if outcome is not None:
        return f"{state.name} left: {outcome.name.lower()} {text}".rstrip()
    if text:
        return f"{state.name} {text}: another process has its address now"
    round_ = -1 if state.beat is None else state.beat.round  # -1 before the first one
    where = f" in round {round_}" if round_ >= 0 else ""
    silent_s = (now_ns - state.seen_ns) / 1e9
    return f"{state.name} died{where}: it has been silent for {silent_s:.1f} s"
