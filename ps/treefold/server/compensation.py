"""What a stale contribution is stepped with; pure.

A contribution is as stale as versions were made between the one that it was computed with and the
one that it is applied to.
"""

from dataclasses import dataclass

from treefold.common.spec import Compensation, Hyper

MEMORY = 256  # contributions that the mean staleness is of, about


@dataclass(slots=True)
class StalenessMean:
    """The mean staleness of the last contributions to a shard.

    Attributes
    ----------
    value : float
        In versions.
    """

    value: float = 0.0
    _count: int = 0

    def add(self, stale: int) -> None:
        """Count one contribution in."""
        self._count = min(self._count + 1, MEMORY)
        self.value += (stale - self.value) / self._count


def compensated(rule: Compensation, groups: list[Hyper], stale: int, mean: float) -> list[Hyper]:
    """Hyper-parameters that a contribution is stepped with.

    Parameters
    ----------
    rule : Compensation
        The table's.
    groups : list of dict
        What its worker says, by param group.
    stale : int
        The contribution's staleness.
    mean : float
        That of the last ones.

    Returns
    -------
    list of dict
        By param group.
    """
    if rule is Compensation.LR_STALENESS and stale > 1:
        return [_slower(group, stale) for group in groups]
    if rule is Compensation.MOMENTUM and mean > 0:
        return [_with_less_momentum(group, mean) for group in groups]
    return groups


def _slower(group: Hyper, stale: int) -> Hyper:
    """The learning rate divided by the staleness.

    Source: Zhang et al., Staleness-aware async-SGD for distributed deep learning, IJCAI 2016,
    section 3.
    """
    lr = group.get("lr")
    return group | {"lr": lr / stale} if isinstance(lr, int | float) else group


def _with_less_momentum(group: Hyper, mean: float) -> Hyper:
    """The momentum without what being asynchronous adds to it.

    Source: Mitliagkas et al., Asynchrony begets momentum, Allerton 2016: W workers act like a
    momentum of ``1 - 1/W``. Their mean staleness is W - 1.
    """
    momentum = group.get("momentum")
    if not isinstance(momentum, int | float):
        return group
    return group | {"momentum": max(0.0, momentum - mean / (mean + 1))}
