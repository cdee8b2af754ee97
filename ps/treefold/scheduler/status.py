"""What is going on, as one JSON document: for `treefold status` and the progress display."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from treefold.common.spec import ConsistencyKind
from treefold.wire.words import PROTOCOL_VERSION, Role

if TYPE_CHECKING:
    from treefold.common.spec import Consistency
    from treefold.scheduler.core import SchedulerCore
    from treefold.scheduler.members import MemberState


def status_of(core: SchedulerCore, now_ns: int) -> bytes:
    """The scheduler's knowledge at ``now_ns`` as JSON bytes; ``docs/cli.md`` names the fields."""
    states = core.roster.by_incarnation.values()
    document = {
        "phase": core.phase.name.lower(),
        "view": core.view.number,
        "job": core.limits.job,
        "metrics": core.metrics,
        "protocol": PROTOCOL_VERSION,
        "facts": core.facts,
        "expected": {"servers": core.limits.servers, "workers": core.limits.workers},
        "round": _round(core),
        "rounds_per_second": round(core.balance.round_rate, 3),
        "slots": len(core.view.leases.workers),
        "plan": _plan(core),
        "members": [_member(core, state, now_ns) for state in states],
        "tables": [_table(core, number) for number in range(len(core.tables))],
        "checkpoint": _checkpoint(core),
        "events": core.events.document(),
        "ending": None
        if core.ending is None
        else {"outcome": core.ending.outcome.name.lower(), "text": core.ending.text},
    }
    return msgspec.json.encode(document)


def _round(core: SchedulerCore) -> int:
    """The round that the job is in, as the plan numbers them."""
    if any(table.spec.is_quorum for table in core.tables):
        return core.quorums.planned
    workers = (s for s in core.roster.by_incarnation.values() if s.member.role is Role.WORKER)
    return max((state.beat.round for state in workers if state.beat), default=0)


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
        "metrics": beat.metrics if beat else "",
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
        "facts": _facts(core, state),
        "spent_s": {k: round(ns / 1e9, 6) for k, ns in beat.spent_ns.items()} if beat else {},
    }


def _facts(core: SchedulerCore, state: MemberState) -> dict[str, object] | None:
    """Where a member runs; its clock against this scheduler's, which wrote down its own."""
    facts = state.facts
    if facts is None:
        return None
    ahead_s = max(state.clock_leads_ns) / 1e9 - core.events.wall_s
    return {
        "package": facts.package,
        "python": facts.python,
        "torch": facts.torch,
        "files_max": facts.files_max,
        "memory_free_bytes": facts.memory_free_bytes,
        "clock_ahead_s": round(ahead_s, 4),
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
        "consistency": _consistency(table.spec.consistency),
        "staleness": _staleness(core, number, names),
        "missed": core.quorums.missed if table.spec.is_quorum else 0,
        **core.health.status_of(number, table.spec),
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


def _consistency(rule: Consistency) -> str:
    kind = rule.kind.name.lower()
    if rule.kind is ConsistencyKind.QUORUM:
        return f"{kind}({rule.quorum})"
    bound = rule.staleness if rule.kind is ConsistencyKind.SSP else rule.staleness_max
    return f"{kind}({bound})" if rule.kind is ConsistencyKind.SSP or bound else kind


def _staleness(
    core: SchedulerCore, number: int, names: dict[int, str]
) -> dict[str, dict[str, int]]:
    """How stale the contributions of each worker were, as its shard 0 has counted them."""
    totals: dict[str, list[int]] = {}
    for state in core.roster.by_incarnation.values():
        for table, worker, counts in state.beat.staleness if state.beat else ():
            if table == number:
                name = names.get(worker, str(worker))  # that of one whose place it took, perhaps
                known = totals.setdefault(name, [0] * len(counts))
                totals[name] = [sum(pair) for pair in zip(known, counts, strict=True)]
    return {
        name: {
            "contributions": sum(counts),
            "median": _quantile(counts, 50),
            "p99": _quantile(counts, 99),
        }
        for name, counts in totals.items()
    }


def _quantile(counts: list[int], percent: int) -> int:
    """The most that so many in a hundred are; classes are 0, 1, 2 to 3, 4 to 7 and so on."""
    wanted, seen = sum(counts) * percent, 0
    for order, count in enumerate(counts):
        seen += count
        if 100 * seen >= wanted:
            return (1 << order) - 1
    return 0
