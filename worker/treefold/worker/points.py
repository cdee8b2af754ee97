"""At which messages and effects a test may let a worker die; see `treefold.transport.points`."""

from treefold.transport.points import Points
from treefold.wire.messages import DeclareTable, Leave, Pulled, Push, Register, RoundMeta

POINTS = Points(
    received={Pulled: "worker.pulled_before_load"},
    before={
        Register: "worker.before_register",
        DeclareTable: "worker.before_declare",
        Push: "worker.before_push",
        RoundMeta: "worker.before_meta",
        Leave: "worker.before_leave",
    },
    first={Push: "worker.first_of_several_pushes_sent"},
)
