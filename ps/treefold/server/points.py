"""At which messages and effects a test may let a server die; see `treefold.transport.points`."""

from treefold.server.effects import CloseShard, FoldPayloads, MakeParts, OpenShard, RecordVersion
from treefold.transport.points import Points
from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound, UnitCopy, UnitTaken
from treefold.wire.messages import ChainSynced, Leave, Published, Push, View

POINTS = Points(
    received={
        Push: "server.push_received",
        View: "server.view_received",
    },
    before={
        FoldPayloads: "server.before_fold",
        MakeParts: "server.after_fold_before_step",
        Push: "server.before_relay",
        RecordVersion: "server.after_step_before_publish",
        ChainApplied: "server.applied_before_it_is_said",
        ChainAsk: "server.promoted_before_the_chain_is_asked",
        OpenShard: "server.before_shard_is_opened",
        UnitTaken: "server.unit_loaded_before_taken_is_said",
        ChainSynced: "server.before_synced_is_told",
        CloseShard: "server.before_shard_is_closed",
        Leave: "server.before_leave",
    },
    after={
        Push: "server.after_relay",
        ChainRound: "server.after_chain_round",
        UnitCopy: "server.unit_copy_sent",
    },
    first={
        MakeParts: "server.first_of_several_parts_made",
        Published: "server.published_to_the_first_of_several",
    },
)
