"""Parameters whose values are still on their way, and who waits for them.

While a parameter is awaited its class is `AwaitedParameter`: whatever is done with it first waits
for its parts, copies them into it and makes it a plain parameter again. A module waits for its own
parameters before its forward, so that it sees plain ones. The script notices nothing but the time.
"""

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from treefold.common.layout import Layout
from treefold.worker.arrivals import Arrivals

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

LOOKS_INTO_CHILDREN = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Modules that look at parameters of others, and choose by their class what to compute with."""

_AWAITED: dict[int, Callable[[], None]] = {}
_GETTERS = (
    "grad", "requires_grad", "shape", "dtype", "device", "layout", "is_leaf", "ndim", "grad_fn",
    "is_cpu", "is_cuda", "is_sparse", "is_meta", "_version", "is_quantized", "is_nested",
    "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
    "is_complex", "element_size", "storage_offset", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "get_device", "__hash__", "__len__",
)  # fmt: skip
_HARMLESS: frozenset[object] = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _GETTERS),
        *(getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")),
        vars(torch._C.TensorBase)["grad"].__delete__,
        *(getattr(Tensor, name) for name in _METHODS),
    ]
)
"""What can be asked of a parameter without its values."""


class AwaitedParameter(nn.Parameter):
    """A parameter whose values are not all here. Only `Awaiting` makes them."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:  # noqa: ANN401 # whatever the function returns
        """Wait for the values of every parameter among the arguments, then call."""
        del types
        if func not in _HARMLESS:
            _settle([*args, *(kwargs or {}).values()])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Parameter:
        """Copy the values when they are here."""
        _settle([self])
        copied: nn.Parameter = copy.deepcopy(self, memo)  # a plain parameter by now
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickle the values when they are here."""
        _settle([self])
        return self.__reduce_ex__(protocol)  # a plain parameter's by now


def can_be_awaited(model: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether everybody who uses these parameters of a model would wait for their values."""
    is_plain = all(type(one) is nn.Parameter and one.is_cpu for one in parameters)
    has_script = any(isinstance(one, torch.jit.ScriptModule) for one in model.modules())
    return is_plain and not has_script


def _has_compiled() -> bool:
    """Whether torch's compiler has had something to do in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler is not None and compiler.counters["frames"]["total"] > 0


def _settle(values: Sequence[object]) -> None:
    """Wait for every awaited parameter among values, which may be lists of them."""
    for value in values:
        if isinstance(value, AwaitedParameter):
            settle = _AWAITED.get(id(value))
            if settle is not None:
                settle()
        elif isinstance(value, list | tuple):
            _settle(value)
        elif isinstance(value, dict):
            _settle(list(value.values()))


class Awaiting:
    """The parameters of one table that are awaited.

    Parameters
    ----------
    model : Module
        Whose forward waits.
    parameters : sequence of Parameter
        The table's first tensors.
    layout : Layout
        Its flat space.
    flat : Tensor [elements of the parameters]
        What they are views of.

    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        layout: Layout,
        flat: Tensor,
    ) -> None:
        self._model = model
        self._parameters = list(parameters)
        self._layout = layout
        self._flat = flat
        self._arrivals: Arrivals | None = None
        self._parts: list[list[int]] = []
        self._left: dict[int, None] = {}
        self._open: dict[int, None] = {}
        self._modules: dict[int, list[int]] = {}
        self._hook: RemovableHandle | None = None
        self._lock = threading.RLock()

    def begin(self, arrivals: Arrivals, take_buffers: Callable[[int, int, Tensor], None]) -> None:
        """Await a version; parts with buffers are here, and are taken in now.

        Parameters
        ----------
        arrivals : Arrivals
            Brings its parts.
        take_buffers : callable
            Takes in the start, the stop and the values of a part with buffers.
        """
        self.forget()
        with self._lock:
            self._arrivals = arrivals
            if not self._parts:
                self._learn(arrivals.ranges)
            self._left = dict.fromkeys(range(len(arrivals.ranges)))
            for part, (start, stop) in enumerate(arrivals.ranges):
                if self._layout.has_buffers(start, stop):
                    self._copy(part, take_buffers)
                elif arrivals.is_here(part):
                    self._copy(part)
            torch.autograd.graph.increment_version(self._parameters)
            for number, parts in enumerate(self._parts):
                if any(part in self._left for part in parts):
                    self._await(number)
            if not self._open:
                return
            if _has_compiled():  # what was compiled does not ask for values
                self.settle_all()
                return
            self._modules = self._owners()
            self._hook = register_module_forward_pre_hook(self._before_forward)

    def settle_all(self) -> None:
        """Wait for every parameter."""
        for number in list(self._open):
            self.settle(number)

    def forget(self) -> None:
        """Await nothing any more; what has not come yet will not be in the parameters."""
        with self._lock:
            for number in list(self._open):
                self._restore(number)
            self._arrivals = None
            self._left.clear()
            self._close()

    def settle(self, number: int) -> None:
        """Wait for one parameter, and make it a plain one."""
        with self._lock:
            if number not in self._open:
                return
            for part in self._parts[number]:
                if part in self._left:
                    self._copy(part)
            self._restore(number)
            if not self._open:
                self._close()

    def _learn(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Which parts each parameter lies in."""
        self._parts = [[] for _ in self._parameters]
        for part, (start, stop) in enumerate(ranges):
            for piece in self._layout.pieces(start, stop):
                if piece.tensor < len(self._parameters):
                    self._parts[piece.tensor].append(part)

    def _copy(
        self, part: int, take_buffers: Callable[[int, int, Tensor], None] | None = None
    ) -> None:
        """Wait for a part and copy it, unless the loop body does not count any more."""
        arrivals = self._arrivals
        if arrivals is None:
            return
        self._left.pop(part, None)
        found = arrivals.take(part)
        if found is None:
            return
        values, segment = found
        start, stop = arrivals.ranges[part]
        end = min(stop, self._flat.numel())
        with torch.no_grad():
            if start < end:
                self._flat[start:end].copy_(values[: end - start])
            if take_buffers is not None:
                take_buffers(start, stop, values)
        arrivals.check(segment)

    def _await(self, number: int) -> None:
        parameter = self._parameters[number]
        self._open[number] = None
        _AWAITED[id(parameter)] = lambda: self.settle(number)
        parameter.__class__ = AwaitedParameter

    def _restore(self, number: int) -> None:
        parameter = self._parameters[number]
        del self._open[number]
        _AWAITED.pop(id(parameter), None)
        parameter.__class__ = nn.Parameter

    def _owners(self) -> dict[int, list[int]]:
        """By module: the awaited parameters that it needs before its forward."""
        numbers = {id(self._parameters[number]): number for number in self._open}
        found: dict[int, list[int]] = {}
        for module in self._model.modules():
            is_deep = isinstance(module, LOOKS_INTO_CHILDREN)
            own = [id(parameter) for parameter in module.parameters(recurse=is_deep)]
            needed = [numbers[key] for key in own if key in numbers]
            if needed:
                found[id(module)] = needed
        return found

    def _before_forward(self, module: nn.Module, args: object) -> None:
        del args
        if type(module).__name__ == "OptimizedModule":  # the outside of a compiled one
            self.settle_all()
        for number in self._modules.get(id(module), ()):
            self.settle(number)

    def _close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
