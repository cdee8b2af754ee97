"""Learning-rate schedules: found at the user's optimizer, captured as plain values, restored.

A loop body runs once per slot, and ``scheduler.step()`` in it must count once per round. So every
slot starts from the state that its round started from, and the next round starts from what slot 0
made of it. Schedulers are torch's own objects, made and stepped by the script; this module only
reads and writes their state.
"""

import gc
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Iterable

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from treefold.common.errors import SpecMismatchError, UnsupportedError
from treefold.common.round_state import Schedule

_NOT_HYPER = ("params", "param_names")
_STEP_MARK = "_wrapped_by_lr_sched"  # torch leaves it on the step of a scheduled optimizer

_Plain = object
"""None, bool, int, float, str, bytes, or lists and dicts of these: what MessagePack carries."""


class Schedules:
    """What a script has attached to one optimizer.

    Parameters
    ----------
    optimizers : sequence of Optimizer
        The user's own and the one that wraps it; they share their param groups, and a scheduler may
        be attached to either.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self._optimizers = optimizers
        self._known: list[weakref.ref[LRScheduler]] = []

    def scan(self) -> None:
        """Look for schedulers that were made since the last look.

        Known ones keep their place; new ones follow in the order of their class and state, so that
        the order is alike on every worker.
        """
        if not any(hasattr(optimizer.step, _STEP_MARK) for optimizer in self._optimizers):
            return
        attached = self._attached()
        if {id(item) for item in attached} == {id(item) for item in self._living()}:
            return
        del attached
        gc.collect()  # a scheduler that the script has dropped must not count
        attached = self._attached()
        outermost = {id(item) for item in attached}
        kept = [scheduler for scheduler in self._living() if id(scheduler) in outermost]
        known = {id(scheduler) for scheduler in kept}
        new = [scheduler for scheduler in attached if id(scheduler) not in known]
        self._known = [weakref.ref(item) for item in [*kept, *sorted(new, key=_order)]]

    def capture(self) -> Schedule:
        """The present state.

        Raises
        ------
        UnsupportedError
            A scheduler, or a param group, holds something that cannot travel.
        """
        groups = [
            {
                key: _plain(value, f"param group {number}[{key!r}]")
                for key, value in group.items()
                if key not in _NOT_HYPER
            }
            for number, group in enumerate(self._optimizers[0].param_groups)
        ]
        return Schedule(groups, [_captured(scheduler) for scheduler in self._living()])

    def restore(self, schedule: Schedule) -> None:
        """Bring schedulers and hyper-parameters to an earlier state, types as they are now.

        Raises
        ------
        SpecMismatchError
            The state is that of other schedulers.
        """
        living = self._living()
        here = [_name(scheduler) for scheduler in living]
        there = [name for name, _ in schedule.schedulers]
        groups = self._optimizers[0].param_groups
        if here != there or len(groups) != len(schedule.groups):
            text = (
                f"this worker has schedulers {here} and {len(groups)} param groups, the job "
                f"{there} and {len(schedule.groups)}; every worker must run the same script"
            )
            raise SpecMismatchError(text)
        for scheduler, (_, state) in zip(living, schedule.schedulers, strict=True):
            present = scheduler.state_dict()
            scheduler.load_state_dict(
                {key: _revived(present.get(key), value) for key, value in state.items()}
            )
        for group, values in zip(groups, schedule.groups, strict=True):
            for key, value in values.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = _revived(group.get(key), value)

    def _attached(self) -> list[LRScheduler]:
        """Schedulers of these optimizers, but for those that are steered by another one."""
        kinds = _kinds(LRScheduler)
        mine = [
            item
            for item in gc.get_objects()
            if type(item) in kinds
            and any(getattr(item, "optimizer", None) is own for own in self._optimizers)
        ]
        steered = {id(part) for outer in mine for part in getattr(outer, "_schedulers", ())}
        return [scheduler for scheduler in mine if id(scheduler) not in steered]

    def _living(self) -> list[LRScheduler]:
        return [item for reference in self._known if (item := reference()) is not None]


def _kinds(base: type[LRScheduler]) -> frozenset[type[LRScheduler]]:
    """A class and all classes made from it."""
    return frozenset({base}).union(*(_kinds(kind) for kind in base.__subclasses__()))


def _name(scheduler: LRScheduler) -> str:
    return f"{type(scheduler).__module__}.{type(scheduler).__qualname__}"


def _order(scheduler: LRScheduler) -> tuple[str, bytes]:
    name, state = _captured(scheduler)
    return name, msgspec.msgpack.encode(state)


def _captured(scheduler: LRScheduler) -> tuple[str, dict[str, object]]:
    name = _name(scheduler)
    state = {key: _plain(value, f"{name}.{key}") for key, value in scheduler.state_dict().items()}
    return name, state


def _plain(value: object, where: str) -> _Plain:
    """The value without types that MessagePack does not know; functions are left to the script."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | str | bytes):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [_plain(item, where) for item in value]
    if callable(value):
        return None
    text = (
        f"{where} is a {type(value).__name__}, which cannot be kept with the job; a scheduler's "
        "state must be made of numbers, strings, lists and dicts"
    )
    raise UnsupportedError(text)


def _key(key: object, where: str) -> str | int | float:
    if isinstance(key, str | int | float):
        return key
    text = f"{where} has the key {key!r}; keys must be strings or numbers"
    raise UnsupportedError(text)


def _revived(present: object, value: _Plain) -> object:
    """A plain value as the type that the script has in this place."""
    if isinstance(present, Tensor):
        return torch.full_like(present, value)  # type: ignore[arg-type] # `_plain` made it a number
    if isinstance(present, np.generic):
        return type(present)(value)
    if isinstance(value, dict):
        return _revived_dict(present if isinstance(present, dict) else {}, value)
    if isinstance(value, list):
        items = _items(present, value)
        if isinstance(present, tuple):
            return tuple(items)
        return deque(items, present.maxlen) if isinstance(present, deque) else items
    return present if value is None and callable(present) else value


def _items(present: object, values: list[object]) -> list[object]:
    before: list[object] = list(present) if isinstance(present, Iterable) else []
    before += [None] * (len(values) - len(before))
    return [_revived(old, value) for old, value in zip(before, values, strict=False)]


def _revived_dict(present: dict[object, object], values: dict[object, object]) -> object:
    items = {key: _revived(present.get(key), value) for key, value in values.items()}
    if isinstance(present, Counter):
        return Counter(items)
    if isinstance(present, defaultdict):
        return defaultdict(present.default_factory, items)
    return type(present)(items) if present else items
