"""One table's contributions to a slot: what is sent when, and that each part is sent once.

With overlap a part goes to the client as soon as backward has finished all gradients in it. That is
only right while nobody touches them again before the step, which is watched: the first slot is
never overlapped but shows how the script works, and what breaks the rule later is an error.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor, nn

from treefold.common.errors import LocalProtocolError
from treefold.common.layout import Layout
from treefold.torch.gradients import ABSENT, Gradient, Gradients, check_not_stale
from treefold.torch.parts import Part, cut_parts
from treefold.worker.client import Client, Task


class Overlap(Enum):
    """Whether parts are sent during backward."""

    LEARNING = auto()  # not yet: no slot has shown how the script works
    ON = auto()
    OFF = auto()


@dataclass(frozen=True, slots=True)
class TablePort:
    """Where a table's contributions go."""

    client: Client
    table: int
    layout: Layout

    def ranges(self) -> list[tuple[int, int]]:
        """Elements of each part."""
        return [(part.start, part.stop) for part in self.client.parts(self.table)]


@dataclass(slots=True)
class _Packed:
    """A part with buffers whose gradients are ready; it waits for the end of the loop body."""

    values: Tensor | None
    absent: int


class Pushing:
    """The contributions of one table, slot by slot.

    Parameters
    ----------
    port : TablePort
        The client, and which table this is.
    parameters : sequence of (str, Parameter)
        By name, in the table's order.
    is_overlapped : bool
        Whether parts may be sent during backward.
    is_sparse : bool
        Whether the optimizer takes sparse gradients.
    """

    def __init__(
        self,
        port: TablePort,
        parameters: Sequence[tuple[str, nn.Parameter]],
        is_overlapped: bool,
        is_sparse: bool,
    ) -> None:
        self._port = port
        self._is_sparse = is_sparse
        self.gradients = Gradients(parameters, is_sparse, self._on_finished)
        self.parts = cut_parts(port.layout, port.ranges(), self.gradients.items)
        self._parts_of: list[list[Part]] = [[] for _ in parameters]
        for part in self.parts:
            for number in part.gradients:
                self._parts_of[number].append(part)
        can_overlap = is_overlapped and self.gradients.is_on_cpu
        self.overlap = Overlap.LEARNING if can_overlap else Overlap.OFF
        self._packed: dict[int, _Packed] = {}
        self._task: Task | None = None
        self._scale = 1.0
        self._is_stale_allowed = False
        self.is_stepped = False

    def begin(self, task: Task, scale: float, is_stale_allowed: bool) -> None:
        """Begin a slot.

        Parameters
        ----------
        task : Task
            The slot.
        scale : float
            Its share of the round's samples.
        is_stale_allowed : bool
            Whether gradients may go on accumulating from the step before (own loaders).
        """
        self._task, self._scale, self._is_stale_allowed = task, scale, is_stale_allowed
        self.is_stepped = False
        self._packed.clear()
        self.gradients.begin_slot()
        items = self.gradients.items
        for part in self.parts:
            part.is_sent = False
            part.missing = sum(items[n].parameter.requires_grad for n in part.gradients)

    def step(self) -> None:
        """Send every gradient of the slot that is not on its way yet.

        Raises
        ------
        LocalProtocolError
            A gradient was changed after it had been sent, or is that of an earlier slot.
        """
        self._check_unchanged()
        self._learn()
        for gradient in self.gradients.items:
            if gradient.sent is None:
                self.gradients.settle(gradient)
        if not self._is_stale_allowed:
            check_not_stale(self.gradients.items)
        for part in self.parts:
            if part.is_sent:
                continue
            packed = self._pack(part)
            if part.buffers:
                self._packed[part.number] = packed
            else:
                self._send(part, packed)
        self.is_stepped = True

    def end(self, buffers: Sequence[Tensor | None]) -> None:
        """Send what is left of the slot: buffers, and that there was no step, if there was none.

        Parameters
        ----------
        buffers : sequence of Tensor, float32 [elements of the buffer], or None
            The slot's share of each float buffer, None where it has none.

        Raises
        ------
        LocalProtocolError
            There was no step, but parts of the slot are on their way.
        """
        if not self.is_stepped:
            self._check_nothing_sent("the loop body ended without optimizer.step()")
        for part in self.parts:
            if part.is_sent:
                continue
            packed = self._packed.get(part.number) or _Packed(None, part.all_absent)
            if part.buffers:
                self._add_buffers(part, packed, buffers)
            self._send(part, packed)
        self._task = None

    def check_can_zero(self) -> None:
        """Refuse ``zero_grad`` between a backward whose gradients are on their way and the step."""
        if not self.is_stepped:
            self._check_nothing_sent("optimizer.zero_grad() was called after backward, before step")

    def pause(self) -> AbstractContextManager[None]:
        """Send nothing during backward within this context."""
        return self.gradients.pause()

    def _on_finished(self, number: int) -> None:
        """Backward has finished a gradient."""
        gradient = self.gradients.items[number]
        if self.is_stepped or self._task is None:
            return
        if self.overlap is Overlap.LEARNING:
            gradient.sent, gradient.checksum = gradient.mark(), gradient.sum()
        if self.overlap is not Overlap.ON:
            return
        for part in self._parts_of[number]:
            if part.is_sent:
                text = (
                    f"backward added to the gradient of {gradient.name!r} after it had been sent; "
                    "wrap all backwards of a loop body but the last one in optimizer.no_sync(), "
                    "or pass overlap=False to ps.DistributedOptimizer"
                )
                raise LocalProtocolError(text)
            part.missing -= gradient.fires == 1
            if part.missing == 0 and not part.buffers:
                self._send_early(part)

    def _send_early(self, part: Part) -> None:
        items = [self.gradients.items[number] for number in part.gradients]
        if any(gradient.is_stale for gradient in items):
            return
        for gradient in items:
            self.gradients.settle(gradient)
            gradient.sent = gradient.mark()
        self._send(part, self._pack(part))

    def _pack(self, part: Part) -> _Packed:
        with self._port.client.spent.on("push"):
            return self._packed_now(part)

    def _packed_now(self, part: Part) -> _Packed:
        absent = part.absent_gradients(self.gradients.items)
        if absent == part.all_absent:
            return _Packed(None, absent)
        values = self._scratch(part)
        with torch.no_grad():
            part.write_gradients(self._scale, values)
            if self._is_sparse and self._scale != 1.0:
                part.restore_touched(values)
        return _Packed(values, absent)

    def _scratch(self, part: Part) -> Tensor:
        values = self._port.client.scratch(part.elements)
        if part.has_gaps:
            values.fill_(ABSENT)
        return values

    def _add_buffers(self, part: Part, packed: _Packed, buffers: Sequence[Tensor | None]) -> None:
        for number, piece in part.buffers:
            share = buffers[number]
            if share is None:
                continue
            if packed.values is None:
                packed.values = self._scratch(part)
            size = piece.stop - piece.start
            target = packed.values[piece.start - part.start : piece.stop - part.start]
            target.copy_(share[piece.offset : piece.offset + size])
            packed.absent &= ~(1 << part.pieces.index(piece))

    def _send(self, part: Part, packed: _Packed) -> None:
        if self._task is None:
            raise LocalProtocolError("a contribution outside of a loop body")
        part.is_sent = True
        marks = part.marks(packed.absent)
        self._port.client.contribute(
            self._task, self._port.table, part.number, packed.values, marks
        )

    # ---- what the script does with its gradients ----------------------------------------------

    def _learn(self) -> None:
        """See from a first slot whether gradients are finished once, and then left alone."""
        if self.overlap is not Overlap.LEARNING:
            return
        finished = [gradient for gradient in self.gradients.items if gradient.fires]
        if finished:
            is_plain = all(_is_finished_once(gradient) for gradient in finished)
            self.overlap = Overlap.ON if is_plain else Overlap.OFF
        for gradient in finished:
            gradient.sent = None

    def _check_unchanged(self) -> None:
        if self.overlap is not Overlap.ON:
            return
        for gradient in self.gradients.items:
            if gradient.sent is not None and gradient.sent != gradient.mark():
                text = (
                    f"the gradient of {gradient.name!r} was changed between backward and "
                    "optimizer.step(), after it had been sent; clip with ps.clip_grad_norm, or "
                    "pass overlap=False to ps.DistributedOptimizer"
                )
                raise LocalProtocolError(text)

    def _check_nothing_sent(self, what: str) -> None:
        if any(part.is_sent for part in self.parts):
            text = (
                f"{what}, but gradients of this slot are on their way already; pass overlap=False "
                "to ps.DistributedOptimizer if a loop body may drop its gradients"
            )
            raise LocalProtocolError(text)


def _is_finished_once(gradient: Gradient) -> bool:
    unchanged = gradient.sent == gradient.mark() and gradient.checksum == gradient.sum()
    return gradient.fires == 1 and unchanged
