"""Tensors on their way between members: by which lane, in which messages, held by which number.

Cores name payloads by numbers, messages describe them, sockets and segments carry them; this is
where the three meet. Belongs to the thread that owns the sockets.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import msgspec
import torch
import zmq

from treefold.common.errors import RemoteProtocolError
from treefold.common.fold import TORCH_DTYPES, Payload, view_frame
from treefold.common.layout import split_run
from treefold.transport.lanes import Lanes, LaneSettings
from treefold.transport.segments import Segment
from treefold.transport.sockets import Arrival, Hub
from treefold.wire.codec import encode
from treefold.wire.messages import Frame, Pulled, Push, SegmentAnswer, SegmentOffer

BUFFERS_REMEMBERED_MAX = 64  # with sends, before those whose sends have left are forgotten
SOCKET_PARTS_MAX = (
    1  # parts in one message of the socket lane: what has arrived can be used at once
)


@dataclass(frozen=True, slots=True)
class Held:
    """A payload that is held by a number.

    ``owner`` is the buffer that it is a piece of, for payloads of this process; ``segment`` the
    peer's one that it lies in, for received ones.
    """

    payload: Payload
    owner: torch.Tensor | None = None
    segment: Segment | None = None


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a message goes: by which socket, and to whom.

    ``peer`` is a routing identity for a listener, and the socket's own name for a link.
    """

    socket: Hashable
    peer: Hashable


class Carrier:
    """The tensors of one process's messages.

    Parameters
    ----------
    hub : Hub
        The sockets.
    settings : LaneSettings
        For the shared-memory lane.

    Attributes
    ----------
    lanes : Lanes
        Segments.
    """

    def __init__(self, hub: Hub, settings: LaneSettings) -> None:
        self.lanes = Lanes(settings)
        self._hub = hub
        self._sends: dict[Hashable, list[zmq.MessageTracker]] = {}
        self._held: dict[int, Held] = {}
        self._next = 1

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

    def receive(self, arrival: Arrival, message: Push | Pulled) -> tuple[int, ...] | None:
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
        if not frame.segment:
            views = [view_frame(part, frame.dtype) for part in arrival.payloads]
            return tuple(self.hold(Held(Payload(view, frame.scale))) for view in views)
        try:
            segment = self.lanes.mapped(frame.segment)
        except RemoteProtocolError as error:
            self._answer(arrival, SegmentAnswer(frame.segment, is_mapped=False, text=str(error)))
            return None
        values = self.lanes.view(frame).view(TORCH_DTYPES[frame.dtype])
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
            self._hub.send(socket, _identity(peer), encode(message))

    def _answer(self, arrival: Arrival, answer: SegmentAnswer) -> None:
        self._hub.send(arrival.socket, _identity(arrival.sender), encode(answer))

    # ---- sending ------------------------------------------------------------------------------

    def send(
        self,
        to: Destination,
        message: Push | Pulled,
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
            part = msgspec.structs.replace(
                message, part=message.part + at, count=count, frame=frame
            )
            if isinstance(message, Push) and isinstance(part, Push) and message.absent:
                part = msgspec.structs.replace(part, absent=message.absent[at : at + count])
            trackers = self._send_run(to, part, payloads[at : at + count])
            if trackers is None:
                self.lanes.forget(to.peer)
                return False
            if trackers and buffer is not None:
                if len(self._sends) > BUFFERS_REMEMBERED_MAX:
                    for known in list(self._sends):
                        self.is_busy(known)
                self._sends.setdefault(buffer, []).extend(trackers)
            at += count
        return True

    def is_busy(self, buffer: Hashable) -> bool:
        """Whether something of a buffer is still on its way out of this process."""
        pending = [tracker for tracker in self._sends.pop(buffer, ()) if not tracker.done]
        if pending:
            self._sends[buffer] = pending
        return bool(pending)

    def _next_run(
        self, peer: Hashable, message: Push | Pulled, payloads: Sequence[Payload]
    ) -> tuple[int, Frame]:
        """How many payloads the next message takes, and how it describes them."""
        if message.frame is None:
            raise AssertionError("payloads for a message that has none")
        first = payloads[0]
        wanted = Frame(message.frame.dtype, first.tensor.numel(), first.scale)
        placed = self.lanes.locate(peer, wanted, first.tensor)
        count_max = SOCKET_PARTS_MAX if placed is None else len(payloads)
        count, elements = 1, first.tensor.numel()
        end = first.tensor.data_ptr() + first.tensor.nbytes
        for other in payloads[1:count_max]:
            is_adjacent = placed is None or other.tensor.data_ptr() == end
            if not is_adjacent or other.scale != first.scale:
                break
            count, elements, end = (
                count + 1,
                elements + other.tensor.numel(),
                end + other.tensor.nbytes,
            )
        frame = wanted if placed is None else placed
        return count, msgspec.structs.replace(frame, elements=elements)

    def _send_run(
        self, to: Destination, message: Push | Pulled, payloads: Sequence[Payload]
    ) -> list[zmq.MessageTracker] | None:
        header, identity = encode(message), _identity(to.peer)
        if message.frame is not None and message.frame.segment:
            return [] if self._hub.send(to.socket, identity, header) else None
        frames = [payload.tensor.view(torch.uint8).numpy().data for payload in payloads]
        return self._hub.send_frames(to.socket, identity, header, frames)


def _identity(peer: Hashable) -> bytes | None:
    return peer if isinstance(peer, bytes) else None
