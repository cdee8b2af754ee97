"""Servers with one defect each, and the trouble in which it matters.

Faults as in `tests.support.faults`, planted with ``fault:broken_servers.NAME``. A defect takes one
safeguard away; trouble is what a sound server must get over, in the same job without the defect.
Trouble of one process lasts as long as there is a file named after it and its pid in the folder
``TREEFOLD_TEST_TROUBLE``.
"""

import os
import sys
from pathlib import Path

import msgspec

from treefold.common.tree import Node, contains
from treefold.server import core as server_core
from treefold.server.chains import Chain
from treefold.server.copies import Copies
from treefold.server.core import ServerCore
from treefold.server.effects import Effect, FoldPayloads
from treefold.server.holding import Shard
from treefold.server.rounds import Held, Round
from treefold.transport.loop import Loop
from treefold.transport.outbox import Outbox
from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound, UnitCopy
from treefold.wire.exchange import SCHEDULER, Peer, Received, Send
from treefold.wire.messages import AnyMessage, Push, Refused, RoundHyper, RoundMeta
from treefold.worker.shell import WorkerShell

RELAYED = (ChainAsk, ChainRound, UnitCopy, Push, RoundHyper)

# ---- defects -------------------------------------------------------------------------------------


def no_duplicate_check() -> None:
    """Add a contribution that is there already to what it is in."""
    take = Round.take

    def greedy(
        self: Round, part: int, node: Node, sender: int | None, held: Held, effects: list[Effect]
    ) -> bool:
        if take(self, part, node, sender, held, effects):
            return True
        nodes = self.folds[part].fold.nodes
        over = [kept for known, kept in nodes.items() if contains(known, node)]
        if part in self.made or not over or None in (over[0].payload, held.payload):
            return False
        effects.append(FoldPayloads(over[0].payload or 0, held.payload or 0))
        return True

    setattr(Round, "take", greedy)  # noqa: B010 # mypy forbids it otherwise


def hasty_acknowledgment() -> None:
    """Tell workers of a version that the chain has not applied."""
    setattr(Chain, "holds", lambda *_: True)  # noqa: B010


def forgetful_copy() -> None:
    """Copy a unit without saying that this round's contributions are in it already."""
    begin = Copies._begin_copy

    def careless(self: Copies, now_ns: int, shard: Shard, who: int, unit: int) -> None:
        made = shard.round.made if shard.round is not None else {}
        roots = shard.round.roots if shard.round is not None else {}
        inside = [part for part in shard.parts_of(unit) if part in made and part in roots]
        for part in inside:
            del made[part]
        begin(self, now_ns, shard, who, unit)
        made.update(dict.fromkeys(inside))

    setattr(Copies, "_begin_copy", careless)  # noqa: B010


def no_fence() -> None:
    """Take messages from any view for messages from this one."""
    follow = ServerCore._on_follower

    def trusting(self: ServerCore, now_ns: int, peer: Peer, message: ChainApplied) -> None:
        shard = self.shards.get((message.table, message.shard))
        if shard is not None and isinstance(message, ChainApplied):
            message = msgspec.structs.replace(message, view=shard.chain.view)
        follow(self, now_ns, peer, message)

    setattr(ServerCore, "_on_follower", trusting)  # noqa: B010
    setattr(server_core, "refusal_of_view", lambda *_: None)  # noqa: B010


# ---- trouble -------------------------------------------------------------------------------------


def every_push_twice() -> None:
    """A worker's pushes leave twice."""
    send = WorkerShell._send

    def twice(self: WorkerShell, effect: Send) -> None:
        send(self, effect)
        if isinstance(effect.message, Push):
            send(self, effect)

    setattr(WorkerShell, "_send", twice)  # noqa: B010


def lost_metas() -> None:
    """While there is trouble, nothing that a worker says of slot 0 arrives; it says what is lost.

    Servers can step all parts of a round, but not end it.
    """
    send = WorkerShell._send

    def lossy(self: WorkerShell, effect: Send) -> None:
        if isinstance(effect.message, RoundMeta) and _is_troubled("lossy"):
            _say(f"lost meta of round {effect.message.round}")
            return
        send(self, effect)

    setattr(WorkerShell, "_send", lossy)  # noqa: B010


def deaf() -> None:
    """While there is trouble, a server does not hear its primary; it says what it did not hear."""
    on_data = ServerCore._on_data

    def hard_of_hearing(
        self: ServerCore, now_ns: int, peer: Peer, message: object, payloads: tuple[int, ...]
    ) -> None:
        servers = {who for place in self.places.values() for who in (place.server, *place.backups)}
        if isinstance(message, RELAYED) and message.sender in servers and _is_troubled("deaf"):
            _say(f"deaf to {type(message).__name__}")
            return
        on_data(self, now_ns, peer, message, payloads)

    setattr(ServerCore, "_on_data", hard_of_hearing)  # noqa: B010


def cut_off() -> None:
    """While there is trouble, nothing goes to the scheduler and nothing comes from it.

    A server says which answers of other servers it gets meanwhile.
    """
    send, feed = Outbox.send, Loop.feed

    def send_elsewhere(
        self: Outbox, socket: object, identity: bytes | None, message: AnyMessage
    ) -> None:
        if socket != SCHEDULER or not _is_troubled("cut"):
            send(self, socket, identity, message)

    def hear_others(self: Loop[object, object], event: object) -> None:
        if isinstance(event, Received) and _is_troubled("cut"):
            if event.peer == SCHEDULER:
                return
            if isinstance(event.message, ChainApplied | Refused):
                _say(f"answered with {type(event.message).__name__}")
        feed(self, event)

    setattr(Outbox, "send", send_elsewhere)  # noqa: B010
    setattr(Loop, "feed", hear_others)  # noqa: B010


def _is_troubled(what: str) -> bool:
    return (Path(os.environ["TREEFOLD_TEST_TROUBLE"]) / f"{what}-{os.getpid()}").exists()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
