"""How the contributions of a round are judged, and what counts of them; pure arithmetic.

Everything is computed from inner products over the whole table, so that it is the same however the
table is cut. Contributions are those of whole batches here: what a slot sends, divided by its share
of the samples.
"""

import math
from collections.abc import Sequence
from enum import Enum
from statistics import median
from typing import NamedTuple

from treefold.common.spec import Aggregation, Guard, HealthPolicy

_SPREAD_MIN = 0.05
"""The least deviation of the logarithm of a norm: gradients that hardly differ are no band."""
_NORMAL = 1.4826  # a normal distribution's standard deviation, in median absolute deviations


class Fault(Enum):
    """What is wrong with a contribution.

    One that is small is counted and nothing else, whatever the policy: it does no harm, and a model
    that has learned a batch makes such.
    """

    NONFINITE = "nonfinite"
    HIGH = "high"
    LOW = "low"


class Band(NamedTuple):
    """Logarithms of norms that are usual."""

    low: float
    high: float


class Verdict(NamedTuple):
    """What counts of a round.

    Attributes
    ----------
    faults : dict of int to Fault
        What is wrong, by slot.
    coefficients : list of float
        What each contribution is multiplied with, 0 if it is left out.
    factor : float
        What the sum is multiplied with then.
    is_skipped : bool
        Whether nothing is in, though something was there.
    """

    faults: dict[int, Fault]
    coefficients: list[float]
    factor: float
    is_skipped: bool


def band_of(guard: Guard, norms: Sequence[float]) -> Band | None:
    """The usual norms, from the logarithms of the newest ones; None while they are too few.

    Median and median absolute deviation stand anything in less than half of them. Source: Hampel,
    The influence curve and its role in robust estimation, JASA 1974.
    """
    if len(norms) < guard.warmup:
        return None
    centre = median(norms)
    spread = max(_NORMAL * median([abs(norm - centre) for norm in norms]), _SPREAD_MIN)
    return Band(centre - guard.band * spread, centre + guard.band * spread)


def logarithms(squares: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Logarithms of the norms of contributions; NaN if one is not finite, -inf if it is zero."""
    found = []
    for square, share in zip(squares, shares, strict=True):
        if not math.isfinite(square):
            found.append(math.nan)
        else:
            found.append(0.5 * math.log(square) - math.log(share) if square > 0 else -math.inf)
    return found


def remembered(guard: Guard, norms: Sequence[float], new: Sequence[float]) -> list[float]:
    """The norms that the next band is made of: all that are finite count, also those outside."""
    kept = [*norms, *(norm for norm in new if math.isfinite(norm))]
    return kept[max(0, len(kept) - guard.window) :]


def judge(
    guard: Guard, norms: Sequence[float], products: Sequence[float], shares: Sequence[float]
) -> Verdict:
    """Decide what counts of a round.

    Parameters
    ----------
    guard : Guard
        The table's rules.
    norms : sequence of float
        Logarithms of the norms of earlier contributions.
    products : sequence of float
        Sums of squares of what slots sent; with a paired rule the products of each with itself and
        the later ones.
    shares : sequence of float
        Each slot's share of the samples of the round.
    """
    slots = len(shares)
    is_paired = guard.aggregation.is_paired
    squares = [products[_at(slots, one, one)] for one in range(slots)] if is_paired else products
    found = logarithms(squares, shares)
    band = band_of(guard, norms) if guard.policy is not HealthPolicy.OFF else None
    faults = {slot: fault for slot in range(slots) if (fault := _fault(found[slot], band))}
    coefficients = [1.0] * slots
    for slot, fault in faults.items():
        coefficients[slot] = _coefficient(guard, fault, found[slot], band)
    is_bad = any(fault is not Fault.LOW for fault in faults.values())
    if is_bad and guard.policy is HealthPolicy.SKIP_ROUND:
        coefficients = [0.0] * slots
    factor = 1.0
    if guard.aggregation.is_paired:
        coefficients = _paired(guard, coefficients, products, shares)
    elif guard.aggregation.is_by_coordinate:
        count = sum(one > 0 for one in coefficients)
        if 2 * guard.trimmed(count) >= count:
            coefficients = [0.0] * slots
    else:
        factor = _factor(coefficients, shares)
    return Verdict(faults, coefficients, factor, not any(coefficients))


def _fault(norm: float, band: Band | None) -> Fault | None:
    if math.isnan(norm):
        return Fault.NONFINITE
    if band is None or norm == -math.inf:  # nothing at all is no harm
        return None
    if norm > band.high:
        return Fault.HIGH
    return Fault.LOW if norm < band.low else None


def _coefficient(guard: Guard, fault: Fault, norm: float, band: Band | None) -> float:
    """What a contribution with a fault is multiplied with."""
    is_mean = guard.aggregation is Aggregation.MEAN
    if fault is Fault.NONFINITE:  # only a mean of what is said not to be touched takes it
        is_kept = guard.policy is HealthPolicy.WARN and is_mean
        return 1.0 if is_kept else 0.0
    if fault is Fault.LOW or band is None:
        return 1.0
    if guard.policy is HealthPolicy.REJECT:
        return 0.0
    return math.exp(band.high - norm) if guard.policy is HealthPolicy.CLIP else 1.0


def _factor(coefficients: Sequence[float], shares: Sequence[float]) -> float:
    """What makes the sum of those that are in a mean of them."""
    if all(coefficients) or not any(coefficients):
        return 1.0
    return 1.0 / math.fsum(s for c, s in zip(coefficients, shares, strict=True) if c)


# ---- rules that need to know how far contributions are apart ----------------------------------


def _at(slots: int, one: int, other: int) -> int:
    """Where the product of two slots stands, the first one not above the other."""
    return one * slots - one * (one - 1) // 2 + other - one


def _paired(
    guard: Guard, coefficients: list[float], products: Sequence[float], shares: Sequence[float]
) -> list[float]:
    slots = len(shares)
    known = [slot for slot in range(slots) if coefficients[slot]]
    scales = [coefficients[slot] / shares[slot] for slot in range(slots)]
    inner = [
        [scales[a] * scales[b] * products[_at(slots, min(a, b), max(a, b))] for b in known]
        for a in known
    ]
    if guard.aggregation is Aggregation.KRUM:
        weights = _krum(inner, guard.byzantine)
    else:
        weights = _centred(inner, guard.radius, guard.iterations)
    out = [0.0] * slots
    for slot, weight in zip(known, weights, strict=True):
        out[slot] = weight * scales[slot]
    return out


def _distance(inner: list[list[float]], one: int, other: int) -> float:
    """The square of how far two contributions are apart."""
    return max(0.0, inner[one][one] + inner[other][other] - 2.0 * inner[one][other])


def _krum(inner: list[list[float]], byzantine: int) -> list[float]:
    """The contribution that is closest to its nearest neighbours; none if they are too few.

    Source: Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient
    descent, NIPS 2017, section 4: of ``n >= 2 f + 3`` the one with the least sum of squared
    distances to its ``n - f - 2`` closest ones; the first of several.
    """
    count = len(inner)
    if count < 2 * byzantine + 3:
        return [0.0] * count
    scores = []
    for one in range(count):
        apart = sorted(_distance(inner, one, other) for other in range(count) if other != one)
        scores.append(math.fsum(apart[: count - byzantine - 2]))
    best = scores.index(min(scores))
    return [float(one == best) for one in range(count)]


def _centred(inner: list[list[float]], radius: float, iterations: int) -> list[float]:
    """A centre, moved by what contributions differ from it, each up to a radius.

    Source: Karimireddy et al., Learning from history for Byzantine robust optimization, ICML 2021,
    section 4. There the centre begins at what the round before made, and the radius is given. Here
    it begins at the contribution with the least sum of distances to all others, so that nothing
    needs to be kept; a radius of 0 is the median of the distances from there.
    """
    count = len(inner)
    if count == 0:
        return []
    apart = [
        [math.sqrt(_distance(inner, one, other)) for other in range(count)] for one in range(count)
    ]
    sums = [math.fsum(row) for row in apart]
    centre = sums.index(min(sums))
    reach = radius or median(apart[centre])
    weights = [float(one == centre) for one in range(count)]
    for _ in range(iterations):
        moves = []
        for one in range(count):
            away = [(1.0 if other == one else 0.0) - weights[other] for other in range(count)]
            far = math.sqrt(max(0.0, _form(inner, away)))
            moves.append(min(1.0, reach / far) / count if far > 0 else 0.0)
        kept = 1.0 - math.fsum(moves)
        weights = [kept * weight + move for weight, move in zip(weights, moves, strict=True)]
    return weights


def _form(inner: list[list[float]], weights: list[float]) -> float:
    """The square of the norm of a weighted sum of contributions."""
    rows = [
        math.fsum(weight * value for weight, value in zip(weights, row, strict=True))
        for row in inner
    ]
    return math.fsum(weight * row for weight, row in zip(weights, rows, strict=True))
