"""Bugs to plant in what goes by the clock: every process has one of its own."""

from tests.sim.planting import Patch, plant
from tests.sim.scenario import Theme
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.members import MemberState
from treefold.server.core import ServerCore
from treefold.wire.exchange import Send
from treefold.wire.membership import Membership
from treefold.wire.messages import Heartbeat
from treefold.worker.core import WorkerCore

CLOCK = "clock"


@plant(Theme.MIXED)
def silence_is_judged_by_the_clock_of_the_silent(patch: Patch) -> None:
    tick, on_heartbeat = Membership.tick, SchedulerCore._on_heartbeat

    def stamped(self: Membership, now_ns: int) -> list[Send]:
        self.vitals.spent_ns[CLOCK] = now_ns
        return tick(self, now_ns)

    def believing(self: SchedulerCore, now_ns: int, state: MemberState, beat: Heartbeat) -> None:
        on_heartbeat(self, now_ns, state, beat)
        state.seen_ns = beat.spent_ns.get(CLOCK, state.seen_ns)

    patch.setattr(Membership, "tick", stamped)
    patch.setattr(SchedulerCore, "_on_heartbeat", believing)


@plant(Theme.MIXED)
def a_worker_waits_since_its_clock_began(patch: Patch) -> None:
    check = WorkerCore._check_waits

    def since_zero(self: WorkerCore, now_ns: int) -> None:
        self._started_ns = 0
        check(self, now_ns)

    patch.setattr(WorkerCore, "_check_waits", since_zero)


@plant(Theme.CHAINED)
def a_scheduler_that_takes_over_goes_by_the_clock_of_the_one_before(patch: Patch) -> None:
    begin = SchedulerCore._begin
    clocks: list[int] = []

    def old(self: SchedulerCore, now_ns: int) -> None:
        clocks.append(now_ns)
        begin(self, now_ns)
        for state in self.roster.live():
            state.seen_ns = clocks[-2] if len(clocks) > 1 else now_ns

    patch.setattr(SchedulerCore, "_begin", old)


@plant(Theme.MIXED)
def a_server_counts_silence_since_its_clock_began(patch: Patch) -> None:
    check = ServerCore._check_orphaned

    def since_zero(self: ServerCore, now_ns: int) -> None:
        self._started_ns = 0
        check(self, now_ns)

    patch.setattr(ServerCore, "_check_orphaned", since_zero)
