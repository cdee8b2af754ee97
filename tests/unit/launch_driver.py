"""A launcher's core with a clock, as tests drive it."""

from treefold.launch.core import MS, LaunchCore, LaunchLimits, Role
from treefold.launch.effects import (
    AddressKnown,
    Effect,
    Event,
    Finish,
    ProcessExited,
    Say,
    StartProcess,
    StatusSeen,
    Tick,
)


class Launch:
    """A core, its clock and everything it wanted done so far."""

    def __init__(
        self, servers: int = 1, workers: int = 2, max_restarts: int = 0, *, is_safe: bool = False
    ) -> None:
        self.core = LaunchCore(LaunchLimits(servers, workers, max_restarts, is_safe))
        self.now_ns = 0
        self.effects: list[Effect] = []
        self.feed(Tick())
        self.feed(AddressKnown())

    def feed(self, *events: Event) -> list[Effect]:
        """Give the core events; returns what came of them."""
        before = len(self.effects)
        for event in events:
            self.now_ns += MS
            self.effects += self.core.handle(self.now_ns, event)
            self.core.check_invariants()
        return self.effects[before:]

    def later(self, ms: int) -> list[Effect]:
        """Let time pass, with a tick at every deadline, as a shell does."""
        before, end_ns = len(self.effects), self.now_ns + ms * MS
        while True:
            deadline_ns = self.core.next_deadline_ns()
            if deadline_ns is None or deadline_ns > end_ns:
                self.now_ns = end_ns
                return self.effects[before:]
            self.now_ns = max(self.now_ns, deadline_ns)
            self.effects += self.core.handle(self.now_ns, Tick())
            self.core.check_invariants()

    def exited(self, name: str, code: int) -> list[Effect]:
        """A process ends, and the scheduler's answer to what the job's state is follows."""
        return self.feed(ProcessExited(name, code))

    def status(self, phase: str = "running", outcome: str = "", text: str = "") -> list[Effect]:
        """The scheduler answers."""
        return self.feed(StatusSeen(self.now_ns, phase, True, outcome, text))

    def worked(self, round_: int, *members: str) -> list[Effect]:
        """The scheduler says who is a member, and how far the job is."""
        seen = StatusSeen(self.now_ns, "running", round=round_, members=frozenset(members))
        return self.feed(seen)

    def end_everybody(self) -> None:
        """Every process that lives ends well."""
        for role in (Role.WORKER, Role.SCHEDULER, Role.SERVER):
            for process in list(self.core.processes.values()):
                if process.role is role and process.is_alive:
                    self.exited(process.name, 0)

    @property
    def code(self) -> int | None:
        """The exit code of the run, None while there is none."""
        codes = [effect.code for effect in self.effects if isinstance(effect, Finish)]
        return codes[0] if codes else None

    @property
    def said(self) -> str:
        """Everything that the operator was told."""
        return "\n".join(effect.text for effect in self.effects if isinstance(effect, Say))

    def started(self, name: str) -> int:
        """How often a process was started."""
        return self.effects.count(StartProcess(name))
