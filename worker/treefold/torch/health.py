"""What users choose for contributions that are not what they should be."""

import math
from dataclasses import dataclass

import msgspec

from treefold.common.config import Settings
from treefold.common.errors import ConfigError, UnsupportedError
from treefold.common.plan import SLOTS_MAX
from treefold.common.spec import (
    AGGREGATIONS,
    BAND_MAX,
    HEALTH_POLICIES,
    ITERATIONS_MAX,
    WINDOW_MAX,
    Aggregation,
    Consistency,
    ConsistencyKind,
    Guard,
)
from treefold.torch.buffers import BufferMode


@dataclass(frozen=True, slots=True)
class Health:
    """What is done about gradients that are not finite, or much larger or smaller than usual.

    The gradient of each slot is measured by the servers. It is usual if the logarithm of its norm
    is at most ``band`` deviations from the median of the newest ones, where a deviation is 1.4826
    times the median absolute deviation, and 0.05 at least.

    Parameters
    ----------
    policy : str
        ``"warn"``: it is counted and named. ``"reject"``: it is left out, and the round is the mean
        of the others. ``"skip-round"``: its round changes nothing. ``"clip"``: it is scaled to the
        upper edge of what is usual; one that is not finite is left out. ``"off"``: nothing.
    band : float
        How many deviations are usual.
    window : int
        The last so many gradients say what is usual. Those that were left out count as well, so
        that it follows where training goes.
    warmup : int
        Before so many gradients came, only finite or not counts.

    Raises
    ------
    ConfigError
        A value is of the wrong kind, or out of range.
    """

    policy: str = "reject"
    band: float = 8.0
    window: int = 256
    warmup: int = 32

    def __post_init__(self) -> None:
        """Check the values."""
        if self.policy not in HEALTH_POLICIES:
            names = ", ".join(map(repr, HEALTH_POLICIES))
            msg = f"health policy {self.policy!r}; it is one of {names}"
            raise ConfigError(msg)
        if not _is_number(self.band) or not 0 < self.band <= BAND_MAX:
            msg = f"band is {self.band!r}; it is a number above 0, at most {BAND_MAX:g}"
            raise ConfigError(msg)
        _check_count("window", self.window, 1, WINDOW_MAX)
        _check_count("warmup", self.warmup, 1, self.window)


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Of each coordinate the mean without the largest and the smallest values.

    Source: Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates,
    ICML 2018.

    Parameters
    ----------
    share : float
        How much of the slots is left out at each end, above 0 and below 0.5; rounded up to whole
        ones. It stands as many bad slots.

    Raises
    ------
    ConfigError
        It is out of range.
    """

    share: float

    def __post_init__(self) -> None:
        """Check the share."""
        if not _is_number(self.share) or not 0 < self.share < 0.5:
            msg = f"a trimmed mean of share={self.share!r}; it is above 0 and below 0.5"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Krum:
    """The one gradient that is closest to its neighbours.

    Source: Blanchard et al., Machine learning with adversaries: Byzantine tolerant gradient
    descent, NIPS 2017.

    Parameters
    ----------
    byzantine : int
        How many bad slots it is to stand, of at least twice as many and three. A round that has
        fewer slots changes nothing.

    Raises
    ------
    ConfigError
        It is negative, or no whole number.
    """

    byzantine: int

    def __post_init__(self) -> None:
        """Check the number."""
        _check_count("byzantine", self.byzantine, 0, SLOTS_MAX)


@dataclass(frozen=True, slots=True)
class CenteredClipping:
    """A centre, moved by what gradients differ from it, each up to a radius.

    Source: Karimireddy et al., Learning from history for Byzantine robust optimization, ICML 2021.
    Here the centre begins at the gradient of the round that is closest to all others, not at what
    the round before made, so that nothing is kept between rounds.

    Parameters
    ----------
    radius : float, optional
        How far one may move the centre in an iteration, times the number of slots; by default the
        median distance from where the centre begins.
    iterations : int
        How often it is moved.

    Raises
    ------
    ConfigError
        A value is of the wrong kind, or out of range.
    """

    radius: float | None = None
    iterations: int = 3

    def __post_init__(self) -> None:
        """Check the values."""
        is_radius = _is_number(self.radius) and 0 < (self.radius or 0) < math.inf
        if self.radius is not None and not is_radius:
            msg = f"radius is {self.radius!r}; it is a finite number above 0, or None"
            raise ConfigError(msg)
        _check_count("iterations", self.iterations, 1, ITERATIONS_MAX)


AggregationChoice = str | TrimmedMean | Krum | CenteredClipping


def guard_of(health: object, aggregation: object, settings: Settings) -> Guard:
    """What happens to contributions before they are applied, as a user chose.

    Parameters
    ----------
    health : str, Health or None
        A policy, or more exactly; None for the job's.
    aggregation : str, TrimmedMean, Krum, CenteredClipping or None
        ``"mean"``, ``"median"``, or one of the others; None for the mean.
    settings : Settings
        The job's.

    Raises
    ------
    ConfigError
        There is no such policy or aggregation.
    """
    value = settings.health if health is None else health
    if isinstance(value, str):
        value = Health(value)
    if not isinstance(value, Health):
        msg = f"health={value!r}; it is one of {', '.join(map(repr, HEALTH_POLICIES))} or ps.Health"
        raise ConfigError(msg)
    policy = HEALTH_POLICIES[value.policy]
    guard = Guard(policy, float(value.band), value.window, value.warmup)
    chosen = "mean" if aggregation is None else aggregation
    if isinstance(chosen, TrimmedMean):
        fields: dict[str, object] = {"share": float(chosen.share)}
        rule = Aggregation.TRIMMED_MEAN
    elif isinstance(chosen, Krum):
        fields, rule = {"byzantine": chosen.byzantine}, Aggregation.KRUM
    elif isinstance(chosen, CenteredClipping):
        fields = {"radius": float(chosen.radius or 0), "iterations": chosen.iterations}
        rule = Aggregation.CENTERED_CLIPPING
    elif chosen in ("mean", "median"):
        fields, rule = {}, AGGREGATIONS[str(chosen)]
    else:
        names = "'mean', 'median', ps.TrimmedMean(...), ps.Krum(...) or ps.CenteredClipping(...)"
        msg = f"aggregation={chosen!r}; it is {names}"
        raise ConfigError(msg)
    return msgspec.structs.replace(guard, aggregation=rule, **fields)


def check_guard(guard: Guard, consistency: Consistency, mode: BufferMode) -> None:
    """Refuse what does not go together with looking at contributions.

    Raises
    ------
    UnsupportedError
        Contributions are applied by themselves, or rounds go on without some; or buffers are
        slot 0's, which may be left out.
    """
    if not guard.is_on:
        return
    kind = consistency.kind
    if kind is not ConsistencyKind.SYNC:
        text = (
            f"health and aggregation need consistency='sync', where the gradients of a round are "
            f"looked at together; this table is {kind.name.lower()!r}"
        )
        raise UnsupportedError(text)
    if guard.is_deciding and mode is BufferMode.SLOT0:
        text = (
            "buffers='slot0' needs slot 0 in every round, which health and aggregation may leave "
            "out; buffers='mean' is the mean of the slots that are in"
        )
        raise UnsupportedError(text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(name: str, value: object, low: int, high: int) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or not isinstance(value, int) or not low <= value <= high:
        msg = f"{name} is {value!r}; it is a whole number from {low} to {high}"
        raise ConfigError(msg)
