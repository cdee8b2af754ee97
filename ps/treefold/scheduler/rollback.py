"""The way back to a checkpoint, when the last copy of a shard is lost.

Everybody is given up and begins anew: servers let go of their shards and register again; workers do
so too, see that the view has another era, and start their scripts from the beginning, which come by
what was trained already without computing it. What was sent before cannot do harm, since every
shard gets a newer view. Until a checkpoint is chosen nothing is placed.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from treefold.scheduler.chains import Chains
from treefold.scheduler.checkpoints import Checkpoints
from treefold.scheduler.declared import Declared
from treefold.scheduler.effects import CheckpointChosen, ChooseCheckpoint, Effect
from treefold.scheduler.members import Happening, Roster
from treefold.wire.exchange import Level, Note, Send
from treefold.wire.messages import Fenced
from treefold.wire.words import Outcome, Role, Source


class Rollback:
    """Goes back to a checkpoint.

    Parameters
    ----------
    roster, declared, chains, checkpoints
        Of the core.

    Attributes
    ----------
    count : int
        How often the job went back.
    is_choosing : bool
        Whether it is not known yet to which checkpoint.
    was_done : bool
        Whether a script had come to its end before, so that nobody need come to do it again.
    """

    def __init__(
        self, roster: Roster, declared: Declared, chains: Chains, checkpoints: Checkpoints
    ) -> None:
        self._roster = roster
        self._declared = declared
        self._chains = chains
        self._checkpoints = checkpoints
        self._round = 0
        self.count = 0
        self.is_choosing = False
        self.was_done = False

    def begin(self, why: str) -> list[Effect]:
        """Let everybody begin anew."""
        states = self._roster.by_incarnation.values()
        beats = [state.beat for state in self._roster.live(Role.WORKER)]
        self._round = max((beat.round for beat in beats if beat is not None), default=0)
        out: list[Effect] = [Note(Level.WARNING, f"{why}; the job goes back to a checkpoint")]
        for state in self._roster.live():
            self._roster.part(state, Happening.SILENCE, None)
            out.append(Send(state.peer, Fenced(state.member.incarnation)))
        was_done = self.was_done or self._roster.is_done
        for state in states:  # what was done is to be done again
            if state.outcome is Outcome.DONE:
                state.outcome = Outcome.DRAINED
        self.take_up(was_done)
        return [*out, ChooseCheckpoint()]

    def take_up(self, was_done: bool) -> None:
        """Nothing lies anywhere, and a checkpoint is to be chosen."""
        self.count += 1
        self.was_done = was_done
        self.is_choosing = True
        self._declared.forget_places()
        self._chains.forget()

    def choose(self, event: CheckpointChosen) -> list[Effect] | None:
        """Go on from there, or from the start if none was made; None if all are damaged."""
        if not self.is_choosing:
            return []
        if event.manifest is None and self._checkpoints.is_any:
            return None
        self.is_choosing = False
        if event.manifest is None:
            self._checkpoints.begin_at(None)
            return [Note(Level.WARNING, "there is no checkpoint yet: the job begins again")]
        version = event.manifest.version
        tables = [(table.spec, table.record) for table in event.manifest.tables]
        source = Source(event.folder, version)
        self._declared.begin_from(source, tables)
        self._checkpoints.begin_at(source)
        rounds = max(0, self._round - version)
        text = f"the job goes back to version {version}: {rounds} rounds are computed again"
        return [Note(Level.WARNING, text)]
