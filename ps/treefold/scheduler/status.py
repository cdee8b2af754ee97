"""What is going on, as one JSON document: for `treefold status` and the progress display."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from treefold.wire.words import Role

if TYPE_CHECKING:
    from treefold.scheduler.core import SchedulerCore
    from treefold.scheduler.members import MemberState


def status_of(core: SchedulerCore, now_ns: int) -> bytes:
    """The scheduler's knowledge at ``now_ns`` as JSON bytes; ``docs/cli.md`` names the fields."""
    states = core.roster.by_incarnation.values()
    document = {
        "phase": core.phase.name.lower(),
        "view": core.view.number,
        "job": core.limits.job,
        "expected": {"servers": core.limits.servers, "workers": core.limits.workers},
        "round": max(
            (s.beat.round for s in states if s.beat and s.member.role is Role.WORKER), default=0
        ),
        "rounds_per_second": round(core.balance.round_rate, 3),
        "slots": len(core.view.leases.workers),
        "plan": _plan(core),
        "members": [_member(core, state, now_ns) for state in states],
        "tables": [_table(core, number) for number in range(len(core.tables))],
        "checkpoint": _checkpoint(core),
        "ending": None
        if core.ending is None
        else {"outcome": core.ending.outcome.name.lower(), "text": core.ending.text},
    }
    return msgspec.json.encode(document)


def _checkpoint(core: SchedulerCore) -> dict[str, object] | None:
    source, known = core.checkpoints.source, core.checkpoints.newest
    if not core.limits.checkpoint and source is None:
        return None
    beats = [state.beat for state in core.roster.live(Role.SERVER)]
    return {
        "folder": core.limits.checkpoint,
        "newest": known if known >= 0 else None,
        "saving": sum(beat.saving for beat in beats if beat is not None),
        "source": None if source is None else {"folder": source.folder, "version": source.version},
    }


def _plan(core: SchedulerCore) -> dict[str, object] | None:
    if not core.plans:
        return None
    plan = core.plans[max(core.plans)]
    return {
        "kind": plan.kind.name.lower(),
        "epoch": plan.epoch,
        "first_round": plan.first_round,
        "end_round": plan.end_round,
        "batch_size": plan.batch_size,
        "samples": plan.samples,
    }


def _member(core: SchedulerCore, state: MemberState, now_ns: int) -> dict[str, object]:
    beat = state.beat
    who = state.member.incarnation
    return {
        "name": state.name,
        "role": state.member.role.name.lower(),
        "rank": state.member.rank,
        "incarnation": who,
        "state": state.life.name.lower(),
        "host": state.member.host,
        "pid": state.member.pid,
        "address": state.member.address,
        "seen_ms_ago": (now_ns - state.seen_ns) // 1_000_000,
        "is_draining": who in core.chains.draining,
        "slots": [slot for slot, holder in enumerate(core.view.leases.workers) if holder == who],
        "round": beat.round if beat else 0,
        "slot_time_ms": round(state.slot_time_ns / 1e6, 3),
        "samples": beat.samples if beat else 0,
        "loss": beat.loss if beat else None,
        "waiting": beat.waiting if beat else "",
        "rss_bytes": beat.rss_bytes if beat else 0,
        "cpu_percent": beat.cpu_percent if beat else 0.0,
        "spent_s": {k: round(ns / 1e9, 6) for k, ns in beat.spent_ns.items()} if beat else {},
    }


def _table(core: SchedulerCore, number: int) -> dict[str, object]:
    table = core.tables[number]
    names = {who: state.name for who, state in core.roster.by_incarnation.items()}
    shards = table.place.shards if table.place else []
    return {
        "name": table.spec.name,
        "rule": table.spec.rule.name.lower(),
        "optimizer": table.spec.optimizer.name if table.spec.optimizer else None,
        "tensors": len(table.spec.tensors),
        "elements": sum(tensor.elements for tensor in table.spec.tensors),
        "shards": [
            {
                "shard": place.shard,
                "server": names.get(place.server, str(place.server)),
                "backups": [names.get(who, str(who)) for who in place.backups],
                "joining": [names.get(who, str(who)) for who in place.joining],
                "first_block": place.first_block,
                "blocks": place.blocks,
            }
            for place in shards
        ],
    }
