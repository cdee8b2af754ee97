"""Statistics of tensors for the live page: put together from the figures of servers. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from treefold.wire.words import FIGURES_TENSORS_MAX, Role

if TYPE_CHECKING:
    from treefold.scheduler.core import SchedulerCore
    from treefold.wire.words import Figure

KINDS = ("weights", "gradient")


def tensors_of(core: SchedulerCore) -> list[dict[str, object]]:
    """A table's tensors with what is known of their weights and gradients.

    A tensor may lie in several shards. Of each shard the server counts that leads it; until each of
    them has told of its own, a tensor's statistics are of a part of it, and its count says so.
    """
    leading = {
        (number, place.shard): place.server
        for number, table in enumerate(core.tables)
        for place in (table.place.shards if table.place else ())
    }
    found: dict[tuple[int, int, int], list[Figure]] = {}
    for state in core.roster.live(Role.SERVER):
        for figure in state.figures:
            if leading.get((figure.table, figure.shard)) == state.member.incarnation:
                found.setdefault((figure.table, figure.tensor, figure.kind), []).append(figure)
    rows: list[dict[str, object]] = []
    for number, table in enumerate(core.tables):
        for place, spec in enumerate(table.spec.tensors[:FIGURES_TENSORS_MAX]):
            kinds = {
                name: _told(found[number, place, kind])
                for kind, name in enumerate(KINDS)
                if (number, place, kind) in found
            }
            if kinds:
                known = {"table": table.spec.name, "name": spec.name, "shape": spec.shape}
                rows.append({**known, **kinds})
    return rows


def _told(figures: list[Figure]) -> dict[str, float | None]:
    count = sum(one.count for one in figures)
    mean = sum(one.sum for one in figures) / max(1, count)
    squares = sum(one.squares for one in figures)
    spread = squares / max(1, count) - mean * mean
    numbers = {
        "mean": mean,
        "std": math.sqrt(max(0.0, spread)) if math.isfinite(spread) else math.nan,
        "min": min(one.least for one in figures),
        "max": max(one.greatest for one in figures),
        "norm": math.sqrt(squares) if squares >= 0 else math.nan,
    }
    finite = {name: one if math.isfinite(one) else None for name, one in numbers.items()}
    return {"count": count} | finite
