"""Tensors on their way between members: by which lane, in which messages, held by which number.

Cores name payloads by numbers, messages describe them, sockets and segments carry them; this is
where the three meet. Belongs to the thread that owns the sockets.
"""

import time
from collections.abc import Collection, Hashable, Sequence

import msgspec
import torch
import zmq

from treefold.common.errors import RemoteProtocolError
from treefold.common.fold import Payload, view_frame
from treefold.common.layout import split_run
from treefold.transport.lanes import Lanes, LaneSettings
from treefold.transport.outbox import Outbox
from treefold.transport.pacing import Pacer
from treefold.transport.segments import Segment
from treefold.transport.sockets import Arrival
from treefold.wire.chain import UnitCopy
from treefold.wire.codec import encode
from treefold.wire.messages import Pulled, Push
from treefold.wire.segments import SegmentAnswer, SegmentOffer
from treefold.wire.words import FRAME_BYTES_MAX, RUN_BYTES_MAX, Frame

TensorMessage = Push | Pulled | UnitCopy
BUFFERS_REMEMBERED_MAX = 64  # with sends, before those whose sends have left are forgotten


class Held(msgspec.Struct, frozen=True, gc=False):
    """A payload that is held by a number.

    ``owner`` is the buffer that it is a piece of, for payloads of this process; ``segment`` the
    peer's one that it lies in, for received ones.
    """

    payload: Payload
    owner: torch.Tensor | None = None
    segment: Segment | None = None


class Destination(msgspec.Struct, frozen=True, gc=False):
    """Where a message goes: by which socket, and to whom.

    ``peer`` is a routing identity for a listener, and the socket's own name for a link. Parts in
    ``urgent`` leave first where there is a cap.
    """

    socket: Hashable
    peer: Hashable
    urgent: Collection[int] = ()


class Carrier:
    """The tensors of one process's messages.

    Parameters
    ----------
    outbox : Outbox
        Sends.
    settings : LaneSettings
        For the shared-memory lane.

    Attributes
    ----------
    lanes : Lanes
        Segments.
    """

    def __init__(self, outbox: Outbox, settings: LaneSettings) -> None:
        self.lanes = Lanes(settings)
        self._outbox = outbox
        self._sends: dict[Hashable, list[zmq.MessageTracker]] = {}
        self._held: dict[int, Held] = {}
        self._next = 1
        self._pacer = Pacer(settings.bytes_per_s)
        self._paced: dict[Hashable, int] = {}
        self._queued: dict[Hashable, None] = {}

    # ---- payloads by number -------------------------------------------------------------------

    def __len__(self) -> int:
        """How many payloads are held."""
        return len(self._held)

    def hold(self, held: Held) -> int:
        """Hold a payload; returns its number."""
        number = self._next
        self._next += 1
        self._held[number] = held
        return number

    def held(self, number: int) -> Held:
        """What is held by a number."""
        return self._held[number]

    def put(self, number: int, held: Held) -> None:
        """Hold something else by this number."""
        self._held[number] = held

    def drop(self, number: int) -> Held:
        """What was held by a number, and is no longer."""
        return self._held.pop(number)

    # ---- arrivals -----------------------------------------------------------------------------

    def receive(self, arrival: Arrival, message: TensorMessage) -> tuple[int, ...] | None:
        """Hold the payloads of a message, one per part.

        Returns
        -------
        tuple of int, or None
            Their numbers; None if the message has to be ignored, since it speaks of a segment that
            is not mapped here. The sender is told, and sends bytes from then on.

        Raises
        ------
        RemoteProtocolError
            The payload is not inside of its segment.
        """
        frame = message.frame
        if frame is None:
            return ()
        segment = None
        if frame.segment:
            try:
                segment = self.lanes.mapped(frame.segment)
            except RemoteProtocolError as error:
                answer = SegmentAnswer(frame.segment, is_mapped=False, text=str(error))
                self._answer(arrival, answer)
                return None
            values = self.lanes.view(frame)
            self._outbox.traffic.of(arrival.socket, arrival.sender).shared_bytes += frame.nbytes
        else:
            values = view_frame(arrival.payloads[0], frame.dtype)
        if message.count == 1:
            return (self.hold(Held(Payload(values, frame.scale), None, segment)),)
        parts = torch.split(values, split_run(message.count, frame.elements))
        return tuple(self.hold(Held(Payload(p, frame.scale), None, segment)) for p in parts)

    def on_segment(self, arrival: Arrival, message: SegmentOffer | SegmentAnswer) -> None:
        """Deal with an offer of shared memory, or with the answer to ours."""
        if isinstance(message, SegmentAnswer):
            self.lanes.on_answer(arrival.sender, message)
            return
        answer = self.lanes.on_offer(message)
        self._answer(arrival, answer)
        if answer.is_mapped:
            self.offer(arrival.socket, arrival.sender)

    def offer(self, socket: Hashable, peer: Hashable) -> None:
        """Offer a peer all segments that it has not been offered yet."""
        for message in self.lanes.offers(peer):
            self._outbox.send(socket, _identity(peer), message)

    def _answer(self, arrival: Arrival, answer: SegmentAnswer) -> None:
        self._outbox.send(arrival.socket, _identity(arrival.sender), answer)

    def forget(self, peer: Hashable) -> None:
        """A peer cannot be reached any more."""
        self.lanes.forget(peer)

    # ---- sending ------------------------------------------------------------------------------

    def send(
        self,
        to: Destination,
        message: TensorMessage,
        payloads: Sequence[Payload],
        buffer: Hashable = None,
    ) -> bool:
        """Send a run of parts, in as few messages as the lane to this peer allows.

        Parameters
        ----------
        to : Destination
            Socket and peer.
        message : Push or Pulled
            Of the whole run; its frame says dtype and elements.
        payloads : sequence of Payload
            One per part. Sent without a copy, so they must stay as they are: pushed ones until the
            version that they make is there, since a message that leaves later is a duplicate.
        buffer : hashable, optional
            Names the buffer that all payloads lie in, for `is_busy`.

        Returns
        -------
        bool
            False if the peer cannot be reached.
        """
        at = 0
        while at < len(payloads):
            count, frame = self._next_run(to.peer, message, payloads[at:])
            first = message.part + at
            part = msgspec.structs.replace(message, part=first, count=count, frame=frame)
            if isinstance(part, Push) and part.absent and count < message.count:
                absent = part.absent[at : at + count]
                part = msgspec.structs.replace(part, absent=absent)
            if self._pacer.is_on:
                self._queue(to, part, payloads[at : at + count], buffer)
            elif not self._send_now(to, part, payloads[at : at + count], buffer):
                return False
            at += count
        self.pump(time.monotonic_ns())
        return True

    def _send_now(
        self,
        to: Destination,
        message: TensorMessage,
        payloads: Sequence[Payload],
        buffer: Hashable,
    ) -> bool:
        trackers = self._send_run(to, message, payloads)
        if trackers is None:
            self.lanes.forget(to.peer)
            return False
        if trackers and buffer is not None:
            if len(self._sends) > BUFFERS_REMEMBERED_MAX:
                for known in list(self._sends):
                    self.is_busy(known)
            self._sends.setdefault(buffer, []).extend(trackers)
        return True

    # ---- a cap --------------------------------------------------------------------------------

    def _queue(
        self,
        to: Destination,
        message: TensorMessage,
        payloads: Sequence[Payload],
        buffer: Hashable,
    ) -> None:
        """Send when there is room under the cap; once, while it waits."""
        key = (to.peer, encode(message))
        if key in self._queued:
            return
        self._queued[key] = None
        self._paced[buffer] = self._paced.get(buffer, 0) + 1

        def send() -> None:
            del self._queued[key]
            self._paced[buffer] -= 1
            self._send_now(to, message, payloads, buffer)

        round_ = message.round if isinstance(message, Push) else message.version
        is_late = message.part not in to.urgent
        nbytes = sum(payload.tensor.nbytes for payload in payloads)
        place = (is_late, round_, message.table, message.shard, message.part)
        self._pacer.add(to.peer, place, nbytes, send)

    def pump(self, now_ns: int) -> None:
        """Send what the cap allows by now."""
        self._pacer.pump(now_ns)

    def next_deadline_ns(self) -> int | None:
        """When `pump` has something to do."""
        return self._pacer.next_deadline_ns()

    def is_busy(self, buffer: Hashable) -> bool:
        """Whether something of a buffer is still on its way out of this process."""
        if self._paced.get(buffer):
            return True
        self._paced.pop(buffer, None)
        pending = [tracker for tracker in self._sends.pop(buffer, ()) if not tracker.done]
        if pending:
            self._sends[buffer] = pending
        return bool(pending)

    def _next_run(
        self, peer: Hashable, message: TensorMessage, payloads: Sequence[Payload]
    ) -> tuple[int, Frame]:
        """How many payloads the next message takes, and how it describes them."""
        if message.frame is None:
            raise AssertionError("payloads for a message that has none")
        first = payloads[0]
        tensor, scale = first
        segment, offset = self.lanes.locate(peer, tensor) or (0, 0)
        begin = tensor.data_ptr()
        end_max = begin + (RUN_BYTES_MAX if segment else FRAME_BYTES_MAX)
        count, elements, end = 1, tensor.numel(), begin + tensor.nbytes
        for other in payloads[1:]:
            after = end + other.tensor.nbytes
            is_next = other.tensor.data_ptr() == end and after <= end_max
            if not is_next or other.scale != scale or not _is_one_memory(tensor, other.tensor):
                break
            count += 1
            elements += other.tensor.numel()
            end = after
        return count, Frame(message.frame.dtype, elements, scale, segment, offset)

    def _send_run(
        self, to: Destination, message: TensorMessage, payloads: Sequence[Payload]
    ) -> list[zmq.MessageTracker] | None:
        identity = _identity(to.peer)
        if message.frame is not None and message.frame.segment:
            self._outbox.send(to.socket, identity, message)
            self._outbox.traffic.to(to.socket, to.peer).shared_bytes += message.frame.nbytes
            return []
        values = payloads[0].tensor
        if message.count > 1:  # which lie one after the other
            values = values.as_strided((sum(one.tensor.numel() for one in payloads),), (1,))
        frame = values.view(torch.uint8).numpy().data
        return self._outbox.send_frame(to.socket, identity, message, frame)


def _is_one_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of the same allocation."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _identity(peer: Hashable) -> bytes | None:
    return peer if isinstance(peer, bytes) else None
