"""One table's contributions to a slot: what is sent when, and that each part is sent once.

With overlap a part goes to the client as soon as backward has finished all gradients in it. That is
only right while nobody touches them again before the step, which is watched: the first slot is
never overlapped but shows how the script works, and what breaks the rule later is an error.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

import torch
from torch import Tensor, nn

from treefold.common.errors import LocalProtocolError
from treefold.common.fold import TORCH_DTYPES
from treefold.common.layout import Layout
from treefold.torch import staging, streams
from treefold.torch.gradients import ABSENT, Gradient, Gradients, Place, check_not_stale
from treefold.torch.parts import Part, cut_parts, joint_runs
from treefold.torch.staging import Copy, Outward
from treefold.worker.client import Client
from treefold.worker.handed import PartRun, Task
from treefold.worker.shell import Values


class Overlap(Enum):
    """Whether parts are sent during backward."""

    LEARNING = auto()  # not yet: no slot has shown how the script works
    ON = auto()
    OFF = auto()


class Lending(Enum):
    """Whether gradients are sent from where they lie, without a copy."""

    LEARNING = auto()  # not yet: no slot has shown that they are left alone after the step
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

    def place(self) -> Place:
        """Where gradients can be lent from."""
        return Place(self.layout.starts, self.layout.elements, self.client.flats)


class Source(Enum):
    """Where the values of a part lie."""

    NOWHERE = auto()  # no tensor of it has a gradient
    GRADIENTS = auto()  # in the gradients themselves, not scaled
    SCRATCH = auto()  # in this slot's scratch buffer, scaled
    STAGED = auto()  # on an accelerator, to be copied to the scratch buffer


@dataclass(slots=True)
class _Packed:
    """A part that is ready to be sent."""

    part: Part
    source: Source
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
        only = [parameter for _, parameter in parameters]
        accelerator = None if is_sparse else streams.port_of(only)
        self._outward = None if accelerator is None else Outward(accelerator)
        place = port.place() if self._outward is None else None
        self.gradients = Gradients(parameters, is_sparse, self._on_finished, place)
        self.parts = cut_parts(port.layout, port.ranges(), self.gradients.items)
        self._parts_of: list[list[Part]] = [[] for _ in parameters]
        for part in self.parts:
            for number in part.gradients:
                self._parts_of[number].append(part)
        is_readable = self.gradients.is_on_cpu or self._outward is not None
        can_overlap = is_overlapped and is_readable
        self.overlap = Overlap.LEARNING if can_overlap else Overlap.OFF
        self.lending = Lending.OFF if self.gradients.flat is None else Lending.LEARNING
        self.on_first: Callable[[], None] = _nothing
        self._packed: dict[int, _Packed] = {}
        self._gathered: list[_Packed] = []
        self._scratch: Tensor | None = None
        self._is_pinned = False
        self._marks: list[tuple[int, int]] = []
        self._fires_after_step = False
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
        self.is_stepped = self._fires_after_step = False
        self._packed.clear()
        self._gathered.clear()
        self._scratch = None
        if self._outward is not None:
            self._outward.begin()
        self.gradients.begin_slot(is_in_use=task.is_lent)
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
        self._send_gathered()
        left = [part for part in self.parts if not part.is_sent]
        self._send([self._pack(part) for part in left if not part.buffers])
        self._packed = {part.number: self._pack(part) for part in left if part.buffers}
        if self._outward is not None:
            with self._port.client.spent.on("push"):
                self._outward.drain()
        self.is_stepped = self.gradients.is_stepped = True
        if self.lending is not Lending.OFF and not self._is_stale_allowed:
            self._marks = [gradient.mark() for gradient in self.gradients.items]

    def end(self, buffers: Sequence[Tensor | None]) -> None:
        """Send what is left of the slot: buffers, and that there was no step, if there was none.

        Parameters
        ----------
        buffers : sequence of Tensor, float32 [elements of the buffer], or None
            The slot's share of each float buffer, None where it has none.

        Raises
        ------
        LocalProtocolError
            There was no step, but parts of the slot are on their way; or gradients were changed
            after the step, while they were being sent.
        """
        if not self.is_stepped:
            self._check_nothing_sent("the loop body ended without optimizer.step()")
        ready = []
        for part in self.parts:
            if not part.is_sent:
                nothing = _Packed(part, Source.NOWHERE, part.all_absent)
                packed = self._packed.get(part.number, nothing)
                if part.buffers:
                    self._add_buffers(packed, buffers)
                ready.append(packed)
        self._send(ready)
        self._learn_lending()
        self._task = None

    def close(self) -> None:
        """Leave the parameters as ordinary ones; what is on its way goes nowhere."""
        if self._outward is not None:
            self._outward.begin()
        self.gradients.close()

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
        if self.is_stepped:
            self._fires_after_step = True
            if self.gradients.is_lent:
                self._refuse_change(gradient)
        if self.is_stepped or self._task is None:
            return
        if self._outward is not None:
            self._outward.note()
        if self.overlap is Overlap.LEARNING:
            if not any(item.fires > 1 or item.sent for item in self.gradients.items):
                self.on_first()
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
        if not any(part.is_sent for part in reversed(self.parts)):
            self.on_first()
        packed = self._pack(part)
        if packed.source is Source.STAGED:
            self._gather(packed)
        else:
            self._send([packed])

    @property
    def _is_lendable(self) -> bool:
        """Whether this slot's gradients can be read where they are until the next version.

        There are two buffers, so that one can be lent while the other one is written to.
        """
        task = self._task
        if task is None or task.is_kept or task.is_lent or self.gradients.flat is None:
            return False
        if self.gradients.has_moved:
            return False
        return self._is_stale_allowed or self.lending is Lending.ON

    def _pack(self, part: Part) -> _Packed:
        absent = part.absent_gradients(self.gradients.items)
        if absent == part.all_absent:
            return _Packed(part, Source.NOWHERE, absent)
        if self._is_lendable and not part.buffers and self._wire(part) == torch.float32:
            return _Packed(part, Source.GRADIENTS, absent)
        if self._outward is not None and not part.buffers:
            return _Packed(part, Source.STAGED, absent)
        with self._port.client.spent.on("push"), torch.no_grad():
            values = self._scratch_of(part)
            if values.dtype == torch.float32:
                self._write(part, values)
            else:
                exact = torch.empty(part.elements)
                self._write(part, exact)
                values.copy_(exact)
        return _Packed(part, Source.SCRATCH, absent)

    def _write(self, part: Part, values: Tensor) -> None:
        part.write_gradients(self._scale, self.gradients.flat, values)
        if self._is_sparse and self._scale != 1.0:
            part.restore_touched(values)

    def _scratch_of(self, part: Part) -> Tensor:
        """The part's place in the scratch buffer, of its wire type; as `Published.part` has it."""
        if self._scratch is None:
            self._scratch = self._port.client.scratch(self._port.layout.elements)
            self._is_pinned = self._outward is not None and self._outward.pin(self._scratch)
        return self._scratch.view(self._wire(part))[part.start : part.stop]

    def _wire(self, part: Part) -> torch.dtype:
        return TORCH_DTYPES[self._port.layout.wire((part.start, part.stop))]

    def _add_buffers(self, packed: _Packed, buffers: Sequence[Tensor | None]) -> None:
        part = packed.part
        for number, piece in part.buffers:
            share = buffers[number]
            if share is None:
                continue
            values = self._scratch_of(part)
            if packed.source is Source.NOWHERE:
                values.fill_(ABSENT)
                packed.source = Source.SCRATCH
            size = piece.stop - piece.start
            target = values[piece.start - part.start : piece.stop - part.start]
            target.copy_(share[piece.offset : piece.offset + size])
            packed.absent &= ~(1 << part.pieces.index(piece))

    def _send(self, ready: list[_Packed]) -> None:
        """Hand parts over, adjacent ones from one source together."""
        run: list[_Packed] = []
        for packed in ready:
            if run and not self._is_next(run[-1], packed):
                self._send_run(run)
                run = []
            run.append(packed)
        if run:
            self._send_run(run)

    def _is_next(self, one: _Packed, after: _Packed) -> bool:
        is_adjacent = after.part.number == one.part.number + 1
        return (
            is_adjacent
            and one.source is after.source
            and self._wire(one.part) == self._wire(after.part)
        )

    def _send_run(self, run: list[_Packed]) -> None:
        if self._task is None:
            raise LocalProtocolError("a contribution outside of a loop body")
        for packed in run:
            packed.part.is_sent = True
        absent: list[bytes] = []
        if any(packed.absent for packed in run):
            absent = [packed.part.marks(packed.absent) for packed in run]
        first, last = run[0].part, run[-1].part
        where = PartRun(self._port.table, first.number, len(run), absent)
        hand = partial(self._port.client.contribute, self._task, where)
        if run[0].source is Source.STAGED and self._outward is not None:
            self._stage(self._outward, [packed.part for packed in run], hand)
        else:
            hand(self._values(run[0].source, first, last))

    def _values(self, source: Source, first: Part, last: Part) -> Values | None:
        start, stop = first.start, last.stop
        if source is Source.GRADIENTS and self.gradients.flat is not None:
            self.gradients.is_lent = True
            return Values(self.gradients.flat[start:stop], self._scale, None)
        if source is Source.SCRATCH and self._scratch is not None:
            own = self._scratch.view(self._wire(first))
            return Values(own[start:stop], 1.0, self._scratch)
        return None

    # ---- gradients on an accelerator ----------------------------------------------------------

    def _gather(self, packed: _Packed) -> None:
        """Send a part with its neighbours: at once if nothing is on its way, or when enough."""
        packed.part.is_sent = True
        run = self._gathered
        if run and self._is_next(packed, run[0]):
            run.insert(0, packed)
        elif run and self._is_next(run[-1], packed):
            run.append(packed)
        else:
            self._send_gathered()
            run = self._gathered = [packed]
        if self._outward is not None:
            self._outward.poll()
            elements = sum(one.part.elements for one in run)
            if self._outward.is_idle or elements * torch.float32.itemsize >= staging.CHUNK_BYTES:
                self._send_gathered()

    def _send_gathered(self) -> None:
        run, self._gathered = self._gathered, []
        if run:
            self._send_run(run)

    def _stage(
        self, outward: Outward, parts: list[Part], hand: Callable[[Values | None], None]
    ) -> None:
        """Let adjacent parts be copied to the scratch buffer, and handed over when they are there.

        What stays float32 is scaled by those who read it, with the same rounding.
        """
        with self._port.client.spent.on("push"):
            first, last = parts[0], parts[-1]
            self._scratch_of(first)
            assert self._scratch is not None
            own = self._scratch.view(self._wire(first))[first.start : last.stop]
            is_exact = own.dtype == torch.float32
            if any(part.has_gaps for part in parts):
                own.fill_(ABSENT)
            here, there = (1.0, self._scale) if is_exact else (self._scale, 1.0)
            copies = [
                Copy(run.source, own[run.start : run.stop], here) for run in joint_runs(parts)
            ]
            values = Values(own, there, self._scratch)
            outward.send(copies, is_pinned=self._is_pinned, hand=partial(hand, values))

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

    def _learn_lending(self) -> None:
        """See from a first slot whether gradients are left alone between the step and its end."""
        if self.lending is Lending.OFF or not self._marks:
            return
        marks, self._marks = self._marks, []
        if self.gradients.is_lent:
            for gradient, then in zip(self.gradients.items, marks, strict=True):
                if gradient.mark() not in (then, (0, 0)):
                    self._refuse_change(gradient)
        elif self.lending is Lending.LEARNING:
            now = [gradient.mark() for gradient in self.gradients.items]
            is_left = all(mark in (then, (0, 0)) for mark, then in zip(now, marks, strict=True))
            is_clean = is_left and not self._fires_after_step
            self.lending = Lending.ON if is_clean else Lending.OFF

    def _refuse_change(self, gradient: Gradient) -> None:
        text = (
            f"the gradient of {gradient.name!r} was changed after optimizer.step(), while it was "
            "being sent; call optimizer.zero_grad() first, or pass lend=False to "
            "ps.DistributedOptimizer"
        )
        raise LocalProtocolError(text)

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
    if gradient.fires != 1 or gradient.sent != gradient.mark() or gradient.checksum is None:
        return False
    return bool(gradient.checksum == gradient.sum())


def _nothing() -> None:
    """Nobody wants to hear of a slot's first part."""
