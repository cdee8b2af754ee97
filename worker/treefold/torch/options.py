"""What users choose by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec

from treefold.common.config import Settings
from treefold.common.errors import ConfigError, UnsupportedError
from treefold.common.plan import SLOTS_MAX
from treefold.common.spec import (
    COMPENSATIONS,
    GRACE_MAX,
    VERSIONS_MAX,
    Compensation,
    Consistency,
    ConsistencyKind,
    Late,
)
from treefold.torch.buffers import BufferMode

STALENESS_MAX = 1 << 31
STRENGTH_MAX = 1e9
LATE = {one.name.lower(): one for one in Late}
_DELAYED = {False: Compensation.DC_ASGD, True: Compensation.DC_ASGD_ADAPTIVE}


@dataclass(frozen=True, slots=True)
class SSP:
    """Stale synchronous parallel: no slot gets further ahead of the slowest than a bound.

    A slot begins round ``t`` with a version that has in it every slot's contributions to rounds
    below ``t - staleness``. Source: Ho et al., More effective distributed ML via a stale
    synchronous parallel parameter server, NIPS 2013, section 3.

    Parameters
    ----------
    staleness : int
        The bound, in rounds. With 0 all slots are in one round, which is not what ``"sync"`` is:
        contributions are applied one by one, and slots see those that are in already.

    Raises
    ------
    ConfigError
        It is negative, or no whole number.
    """

    staleness: int

    def __post_init__(self) -> None:
        """Check the bound."""
        value: object = self.staleness
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if not is_count or not 0 <= self.staleness <= STALENESS_MAX:
            msg = f"staleness is {value!r}; it is a whole number of rounds, 0 or more"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Async:
    """Every contribution is applied by itself, if it is not too stale; otherwise made anew.

    A contribution is as stale as versions of a shard were made since the one that it was computed
    with. One that is staler than the bound is let go, and its batch computed again with the newest
    version, so that every sample still counts once. Source of the idea: Li et al., Scaling
    distributed machine learning with the parameter server, OSDI 2014, section 3.4, bounded delay.

    Parameters
    ----------
    staleness_max : int
        The bound, in versions. With W workers contributions are about W - 1 versions behind.

    Raises
    ------
    ConfigError
        It is no whole number above 0.
    """

    staleness_max: int

    def __post_init__(self) -> None:
        """Check the bound."""
        value: object = self.staleness_max
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if not is_count or not 1 <= self.staleness_max <= STALENESS_MAX:
            msg = f"staleness_max is {value!r}; it is a whole number of versions, 1 or more"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Quorum:
    """Rounds as with ``"sync"``, which go on without the last slots after a while.

    A round is over when all slots have contributed; or when ``slots`` of them have, and others have
    had as long again, times ``grace``, as that took. Source of the idea: Chen et al., Revisiting
    distributed synchronous SGD, 2016, section 3, which drops what is late.

    Parameters
    ----------
    slots : int
        How many of the slots of a round are enough.
    grace : float
        How long the others are waited for, in units of the time that it usually takes to get
        ``slots`` of them.
    late : str
        What becomes of the batches of others: ``"requeue"`` (a later round has them again, so that
        every sample counts once per epoch) or ``"drop"`` (what is in counts for all of the round).
        What was computed of them is never used.

    Raises
    ------
    ConfigError
        A value is of the wrong kind, or out of range.
    """

    slots: int
    grace: float = 0.5
    late: str = "requeue"

    def __post_init__(self) -> None:
        """Check the values."""
        count: object = self.slots
        is_count = isinstance(count, int) and not isinstance(count, bool)
        if not is_count or not 1 <= self.slots <= SLOTS_MAX:
            msg = f"a quorum of slots={count!r}; it is a whole number of slots, 1 or more"
            raise ConfigError(msg)
        grace: object = self.grace
        is_number = isinstance(grace, int | float) and not isinstance(grace, bool)
        if not is_number or not 0 <= self.grace <= GRACE_MAX:
            msg = f"grace is {grace!r}; it is a number from 0 to {GRACE_MAX:g}"
            raise ConfigError(msg)
        if self.late not in LATE:
            msg = f"late is {self.late!r}; it is one of {', '.join(map(repr, LATE))}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class DCASGD:
    """Delay compensation: stale gradients are corrected by how far parameters have moved since.

    Servers add ``strength * g * g * (w - w_old)`` to a gradient ``g`` that was computed at
    ``w_old`` and is applied to ``w``, element by element. Source: Zheng et al., Asynchronous
    stochastic gradient descent with delay compensation, ICML 2017.

    Parameters
    ----------
    strength : float, optional
        How much of it; 0.04 by default, or 2 with ``adaptive``.
    adaptive : bool
        Divide it by the root of the mean square of each element's gradients.
    versions : int
        Older versions of the parameters that servers keep, each as large as the parameters. A
        gradient that is staler is corrected for as many. With W workers about W are needed.

    Raises
    ------
    ConfigError
        A value is of the wrong kind, or out of range.
    """

    strength: float | None = None
    adaptive: bool = False
    versions: int = 16

    def __post_init__(self) -> None:
        """Check the values."""
        strength: object = self.strength
        is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if strength is not None and not (is_number and 0 <= self.factor <= STRENGTH_MAX):
            msg = f"strength is {strength!r}; it is a number from 0 to {STRENGTH_MAX:g}"
            raise ConfigError(msg)
        adaptive: object = self.adaptive
        if not isinstance(adaptive, bool):
            msg = f"adaptive is {adaptive!r}; it is True or False"
            raise ConfigError(msg)
        count: object = self.versions
        is_count = isinstance(count, int) and not isinstance(count, bool)
        if not is_count or not 1 <= self.versions <= VERSIONS_MAX:
            msg = f"versions is {count!r}; it is a whole number from 1 to {VERSIONS_MAX}"
            raise ConfigError(msg)

    @property
    def factor(self) -> float:
        """The strength, chosen or not."""
        default = 2.0 if self.adaptive else 0.04
        return default if self.strength is None else float(self.strength)


def consistency_of(value: object, settings: Settings, compensation: object = None) -> Consistency:
    """When contributions are applied, as a user chose.

    Parameters
    ----------
    value : str, Async, SSP, Quorum or None
        ``"sync"``, ``"async"`` (with the job's bound, if there is one), ``"ssp"`` (with the job's
        staleness), ``"quorum"`` (with the job's quorum, grace and late); None for the job's.
    settings : Settings
        The job's.
    compensation : str, DCASGD or None
        A name of `COMPENSATIONS`, or more exactly; None for the job's.

    Raises
    ------
    ConfigError
        There is no such mode or compensation, or they do not go together.
    """
    rule = _rule_of(value, settings)
    chosen = settings.compensation if compensation is None else compensation
    if chosen == "dc-asgd":
        chosen = DCASGD()
    elif chosen == "dc-asgd-adaptive":
        chosen = DCASGD(adaptive=True)
    if isinstance(chosen, DCASGD):
        known: Compensation | None = _DELAYED[chosen.adaptive]
        rule = msgspec.structs.replace(rule, strength=chosen.factor, versions=chosen.versions)
    else:
        known = COMPENSATIONS.get(chosen) if isinstance(chosen, str) else None
    if known is None:
        names = ", ".join(map(repr, COMPENSATIONS))
        msg = f"compensation={chosen!r}; it is one of {names}, or ps.DCASGD(...)"
        raise ConfigError(msg)
    is_round = rule.kind in (ConsistencyKind.SYNC, ConsistencyKind.QUORUM)
    if known is not Compensation.NONE and is_round:
        msg = f"compensation={chosen!r} needs consistency 'async' or 'ssp': a round is never stale"
        raise ConfigError(msg)
    return msgspec.structs.replace(rule, compensation=known)


def check_compensation(rule: Consistency, groups: Sequence[Mapping[str, object]]) -> None:
    """Refuse a correction of the momentum where there is none.

    Raises
    ------
    ConfigError
        No param group has a momentum.
    """
    has_momentum = any(group.get("momentum") for group in groups)
    if rule.compensation is Compensation.MOMENTUM and not has_momentum:
        msg = "compensation='momentum' needs an optimizer with a momentum above 0"
        raise ConfigError(msg)


def check_buffers(rule: Consistency, mode: BufferMode) -> None:
    """Refuse buffers of a slot that may be left out of a round.

    Raises
    ------
    UnsupportedError
        Buffers are slot 0's, and rounds go on without some slots.
    """
    if rule.kind is ConsistencyKind.QUORUM and mode is BufferMode.SLOT0:
        text = (
            "buffers='slot0' needs slot 0 in every round, which consistency='quorum' may leave "
            "out; buffers='mean' is the mean of the slots that are in"
        )
        raise UnsupportedError(text)


def _rule_of(value: object, settings: Settings) -> Consistency:
    if value is None:
        value = settings.consistency
    if value == "ssp":
        value = SSP(settings.staleness)
    if isinstance(value, SSP):
        return Consistency(ConsistencyKind.SSP, value.staleness)
    if value == "quorum":
        value = Quorum(settings.quorum, settings.grace, settings.late)
    if isinstance(value, Quorum):
        return _quorum_of(value, settings)
    if value == "sync":
        return Consistency()
    if value == "async":
        return Consistency(ConsistencyKind.ASYNC, staleness_max=settings.staleness_max)
    if isinstance(value, Async):
        return Consistency(ConsistencyKind.ASYNC, staleness_max=value.staleness_max)
    names = "'sync', 'async', 'ssp', 'quorum', ps.Async(...), ps.SSP(...) or ps.Quorum(...)"
    msg = f"consistency={value!r}; it is one of {names}"
    raise ConfigError(msg)


def _quorum_of(value: Quorum, settings: Settings) -> Consistency:
    if value.slots > settings.slots:
        msg = f"a quorum of {value.slots} slots, of which a round has {settings.slots}"
        raise ConfigError(msg)
    rule = Consistency(ConsistencyKind.QUORUM, quorum=value.slots)
    return msgspec.structs.replace(rule, grace=float(value.grace), late=LATE[value.late])


class OverlapMode(Enum):
    """What may go on while the script computes."""

    AUTO = "auto"  # both, or none where there is nobody to do it but the computing processors
    BOTH = True  # parts are sent during backward, and come during forward
    BACKWARD = "backward"
    NONE = False

    @classmethod
    def of(cls, value: object) -> "OverlapMode":
        """The mode that a user named.

        Raises
        ------
        ConfigError
            There is none.
        """
        for mode in cls:
            if value is mode.value or (isinstance(value, str) and value == mode.value):
                return mode
        msg = f"overlap={value!r}; it is 'auto', True, 'backward' or False"
        raise ConfigError(msg)
