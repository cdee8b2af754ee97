"""What users choose by name."""

from dataclasses import dataclass
from enum import Enum

import msgspec

from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.common.spec import Compensation, Consistency, ConsistencyKind

STALENESS_MAX = 1 << 31


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


def consistency_of(value: object, settings: Settings, compensation: object = None) -> Consistency:
    """When contributions are applied, as a user chose.

    Parameters
    ----------
    value : str, SSP or None
        ``"sync"``, ``"async"``, ``"ssp"`` (with the job's staleness); None for the job's.
    settings : Settings
        The job's.
    compensation : str or None
        ``"none"`` or ``"lr-staleness"``; None for the job's.

    Raises
    ------
    ConfigError
        There is no such mode or compensation, or they do not go together.
    """
    rule = _rule_of(value, settings)
    chosen = settings.compensation if compensation is None else compensation
    names = {one.name.lower().replace("_", "-"): one for one in Compensation}
    known = names.get(chosen) if isinstance(chosen, str) else None
    if known is None:
        msg = f"compensation={chosen!r}; it is one of {', '.join(map(repr, names))}"
        raise ConfigError(msg)
    if known is not Compensation.NONE and rule.kind is ConsistencyKind.SYNC:
        msg = f"compensation={chosen!r} needs consistency 'async' or 'ssp': a round is never stale"
        raise ConfigError(msg)
    return msgspec.structs.replace(rule, compensation=known)


def _rule_of(value: object, settings: Settings) -> Consistency:
    if value is None:
        value = settings.consistency
    if value == "ssp":
        value = SSP(settings.staleness)
    if isinstance(value, SSP):
        return Consistency(ConsistencyKind.SSP, value.staleness)
    if value == "sync":
        return Consistency()
    if value == "async":
        return Consistency(ConsistencyKind.ASYNC)
    msg = f"consistency={value!r}; it is 'sync', 'async', 'ssp' or ps.SSP(staleness=...)"
    raise ConfigError(msg)


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
