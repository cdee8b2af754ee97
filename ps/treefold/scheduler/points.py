"""At which messages and effects a test may let a scheduler die; see `treefold.transport.points`."""

from treefold.scheduler.effects import Persist
from treefold.transport.points import Points
from treefold.wire.messages import ChainSynced, Heartbeat, Stop, View

POINTS = Points(
    received={
        Heartbeat: "scheduler.heartbeat_received",
        ChainSynced: "scheduler.synced_received",
    },
    before={Persist: "scheduler.before_persist"},
    after={Persist: "scheduler.after_persist_before_send"},
    first={
        View: "scheduler.view_sent_to_the_first_of_several",
        Stop: "scheduler.stop_sent_to_the_first_of_several",
    },
)
