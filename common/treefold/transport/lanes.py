"""The shared-memory lane: which segments this process has, and which peer can read which of them.

A payload that lies in a segment its receiver has mapped travels as a number and an offset; any
other one travels as bytes. The choice is made anew for every message, so a lane that cannot be
opened, or is lost, costs speed and nothing else. Belongs to one process; `allocate` may be called
by any thread, everything else by the thread that owns the sockets.
"""

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from treefold.common.config import Settings
from treefold.common.errors import CapacityError, RemoteProtocolError
from treefold.common.fold import TORCH_DTYPES
from treefold.common.log import logger
from treefold.transport import segments
from treefold.transport.segments import Offer, Segment
from treefold.wire.segments import SegmentAnswer, SegmentOffer
from treefold.wire.words import Frame

PEER_BYTES_MAX = 1 << 40  # of one peer's segment; what is mapped costs nothing until it is read
PEER_SEGMENTS_MAX = 4_096  # of all peers together


@dataclass(frozen=True, slots=True)
class LaneSettings:
    """What the settings say of lanes.

    Attributes
    ----------
    is_enabled : bool
        Whether there is to be one of shared memory.
    bytes_max : int
        How much memory this process's segments may take.
    bytes_per_s : int
        Cap on what goes through each socket, 0 for none.
    """

    is_enabled: bool
    bytes_max: int
    bytes_per_s: int = 0


def lane_settings(settings: Settings) -> LaneSettings:
    """What the settings say of the lane."""
    rate = settings.lane_bytes_per_s  # what lies in shared memory cannot be paced
    return LaneSettings(settings.lane == "auto" and not rate, settings.lane_bytes_max, rate)


@dataclass(slots=True)
class _Peer:
    """What a peer knows of our segments: None while it has not answered."""

    answers: dict[int, bool | None] = field(default_factory=dict)
    is_remote: bool = False


class Lanes:
    """All segments of one process, its own and its peers'.

    Parameters
    ----------
    settings : LaneSettings
        What is allowed.

    Attributes
    ----------
    name : str
        What new segments are called, for people who look at a process's memory.
    """

    def __init__(self, settings: LaneSettings) -> None:
        self.name = "treefold"
        self._settings = settings
        self._own: dict[int, Segment] = {}
        self._bytes = 0
        self._mapped: dict[int, Segment] = {}
        self._peers: dict[Hashable, _Peer] = {}
        self._lock = threading.Lock()
        self._is_said = False
        self._log = logger("transport")

    @property
    def nbytes(self) -> int:
        """Shared memory of our own, in bytes."""
        return self._bytes

    # ---- our own memory -----------------------------------------------------------------------

    def create(self, nbytes: int) -> Segment | None:
        """A segment of our own, None (said once) if there can be none. Offer it with `offers`."""
        if not self._settings.is_enabled:
            return None
        with self._lock:
            try:
                self._check_room(nbytes)
                new = segments.create(self.name, nbytes)
            except CapacityError as error:
                self._say(logging.WARNING, f"payloads go through sockets: {error}")
                return None
            self._own[new.number] = new
            self._bytes += nbytes
            return new

    def _check_room(self, nbytes: int) -> None:
        wanted, limit = self._bytes + nbytes, self._settings.bytes_max
        if wanted > limit:
            raise CapacityError(
                f"{wanted} bytes of shared memory are wanted, lane_bytes_max allows {limit}"
            )

    def allocate(self, elements: int) -> torch.Tensor:
        """Memory for payloads, in a segment if possible.

        Returns
        -------
        Tensor, float32 [elements]
            Zeros, or uninitialised.
        """
        new = self.create(elements * 4) if elements else None
        if new is None:
            return torch.empty(elements)
        return new.body[: elements * 4].view(torch.float32)

    # ---- what peers may read ------------------------------------------------------------------

    def offers(self, peer: Hashable) -> list[SegmentOffer]:
        """Offers of those segments that this peer has not been offered yet."""
        known = self._peers.setdefault(peer, _Peer())
        if known.is_remote:
            return []
        fresh = [own for own in list(self._own.values()) if own.number not in known.answers]
        known.answers |= dict.fromkeys([own.number for own in fresh])
        return [_offer_of(own.offer) for own in fresh]

    def abandon(self, tensor: torch.Tensor) -> None:
        """Let go of the segment that a payload lies in; whoever has mapped it may read on."""
        for number, own in list(self._own.items()):
            if own.offset_of(tensor) is None:
                continue
            with self._lock:
                del self._own[number]
                self._bytes -= own.nbytes
            for known in self._peers.values():
                known.answers.pop(number, None)

    def local_peers(self) -> list[Hashable]:
        """Peers that can read our memory, as far as they have said."""
        found = [(peer, known.answers.values()) for peer, known in self._peers.items()]
        return [peer for peer, answers in found if any(answers)]

    def forget(self, peer: Hashable) -> None:
        """A peer is gone."""
        self._peers.pop(peer, None)

    def locate(self, peer: Hashable, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Segment and offset of a payload that this peer can read; None if it cannot."""
        known = self._peers.get(peer)
        if known is None:
            return None
        for number, is_mapped in known.answers.items():
            own = self._own[number] if is_mapped else None
            offset = None if own is None else own.offset_of(tensor)
            if offset is not None:
                return number, offset
        return None

    def on_answer(self, peer: Hashable, answer: SegmentAnswer) -> None:
        """A peer has mapped a segment, or cannot."""
        known = self._peers.get(peer)
        if known is None or answer.segment not in known.answers:
            return
        known.answers[answer.segment] = answer.is_mapped
        if not answer.is_mapped:
            known.is_remote = True
            text = f"payloads go through sockets to a peer that answers: {answer.text}"
            self._say(logging.INFO, text)  # as it is on any other host

    # ---- what we may read ---------------------------------------------------------------------

    def on_offer(self, offer: SegmentOffer) -> SegmentAnswer:
        """Map a peer's segment if it can be."""
        try:
            self._attach(offer)
        except CapacityError as error:
            return SegmentAnswer(offer.segment, is_mapped=False, text=str(error))
        return SegmentAnswer(offer.segment, is_mapped=True, text="")

    def _attach(self, offer: SegmentOffer) -> None:
        if not self._settings.is_enabled:
            raise CapacityError("the lane is switched off here")
        wanted = Offer(offer.segment, offer.pid, offer.descriptor, offer.nbytes, offer.token)
        known = self._mapped.get(offer.segment)
        if known is not None:
            if known.offer != wanted:
                raise CapacityError("another segment has this number here")
            return
        self.sweep()
        if len(self._mapped) >= PEER_SEGMENTS_MAX or offer.nbytes > PEER_BYTES_MAX:
            raise CapacityError(
                f"a segment of {offer.nbytes} bytes beside {len(self._mapped)} others is too much"
            )
        self._mapped[offer.segment] = segments.attach(wanted)

    def sweep(self) -> None:
        """Let go of the memory of peers that are gone; to be called now and then."""
        gone = [number for number, segment in self._mapped.items() if not segment.is_open()]
        for number in gone:
            del self._mapped[number]
        if gone:
            self._log.debug("let go of %d segments of peers that are gone", len(gone))

    def close(self) -> None:
        """Let go of all segments; memory that is still in use lives until it is not."""
        self._mapped.clear()
        with self._lock:
            self._own.clear()
        self._peers.clear()

    def mapped(self, number: int) -> Segment:
        """A peer's segment.

        Raises
        ------
        RemoteProtocolError
            It was never offered, or its owner is gone.
        """
        found = self._mapped.get(number)
        if found is None:
            raise RemoteProtocolError(f"a payload in segment {number}, which is not mapped here")
        return found

    def view(self, frame: Frame) -> torch.Tensor:
        """The payload that a frame says lies in a peer's segment, of its dtype, read only.

        Raises
        ------
        RemoteProtocolError
            The segment is not mapped, or the payload is not inside of it.
        """
        found = self.mapped(frame.segment)
        end = frame.offset + frame.nbytes
        if end > found.nbytes or frame.offset % frame.dtype.itemsize:
            text = f"a payload at {frame.offset} to {end} of a segment of {found.nbytes} bytes"
            raise RemoteProtocolError(text)
        first = frame.offset // frame.dtype.itemsize
        return found.values(TORCH_DTYPES[frame.dtype])[first : first + frame.elements]

    def _say(self, level: int, text: str) -> None:
        """Once; what follows has the same cause."""
        if not self._is_said:
            self._is_said = True
            self._log.log(level, text)


def _offer_of(offer: Offer) -> SegmentOffer:
    return SegmentOffer(offer.segment, offer.pid, offer.descriptor, offer.nbytes, offer.token)
