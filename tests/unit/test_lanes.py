"""Which payload travels how: in shared memory where a peer has said that it can, else as bytes.

Two ends in one process, whose messages are passed by hand, and two carriers with real sockets.
"""

import gc
import logging
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from treefold.common.errors import RemoteProtocolError
from treefold.common.fold import Payload
from treefold.common.layout import BLOCK_ELEMENTS, PART_BLOCKS_MAX
from treefold.common.spec import Dtype
from treefold.transport import lanes, traffic
from treefold.transport.carrier import Carrier, Destination
from treefold.transport.lanes import Lanes, LaneSettings
from treefold.transport.outbox import Outbox
from treefold.transport.sockets import DATA_FRAME_BYTES_MAX, Arrival, Hub
from treefold.transport.traffic import Traffic, Way
from treefold.wire.chain import UnitCopy
from treefold.wire.codec import check_payload, decode
from treefold.wire.messages import Pulled
from treefold.wire.segments import SegmentAnswer, SegmentOffer
from treefold.wire.words import Frame

ELEMENTS = 5_000
PART = PART_BLOCKS_MAX * BLOCK_ELEMENTS
AUTO = LaneSettings(is_enabled=True, bytes_max=1 << 30)
OFF = LaneSettings(is_enabled=False, bytes_max=1 << 30)
SOCKETS = "payloads go through sockets"


def descriptors() -> list[str]:
    """What is open in this process."""
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True, scope="module")
def _is_sent_from() -> None:
    """Have pyzmq's own thread for what is sent without a copy, which stays when it is there."""
    zmq.Frame(bytearray(1 << 20), copy=False)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    gc.collect()
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What people are told."""
    caplog.set_level("INFO", logger="treefold")
    return caplog


def frame_of(tensor: torch.Tensor) -> Frame:
    """The description of a payload that is not placed yet."""
    return Frame(Dtype.FLOAT32, tensor.numel())


def answers(owner: Lanes, peer: Lanes) -> list[SegmentAnswer]:
    """Pass all new offers of ``owner`` to ``peer``, and the answers back."""
    found = [peer.on_offer(offer) for offer in owner.offers("peer")]
    for answer in found:
        owner.on_answer("peer", answer)
    return found


def place(owner: Lanes, tensor: torch.Tensor, peer: str = "peer") -> Frame:
    """Where a peer can read a tensor."""
    found = owner.locate(peer, tensor)
    assert found is not None
    return Frame(Dtype.FLOAT32, tensor.numel(), 1.0, *found)


# ---- the lane ------------------------------------------------------------------------------------


def test_a_payload_is_placed_once_its_peer_has_mapped_the_memory_and_not_before() -> None:
    owner, peer = Lanes(AUTO), Lanes(AUTO)
    flat = owner.allocate(ELEMENTS)
    flat.copy_(torch.arange(ELEMENTS))
    assert owner.locate("peer", flat) is None
    [offer] = owner.offers("peer")
    assert owner.locate("peer", flat) is None
    owner.on_answer("peer", peer.on_offer(offer))
    piece = flat[100:200]
    frame = place(owner, piece)
    assert (frame.segment, frame.offset, frame.elements) == (offer.segment, 400, 100)
    assert torch.equal(peer.view(frame), piece)
    assert owner.locate("peer", piece.clone()) is None
    assert owner.locate("another", piece) is None
    assert owner.local_peers() == ["peer"]


def test_every_segment_is_offered_once_and_again_to_a_peer_that_was_forgotten() -> None:
    owner = Lanes(AUTO)
    for _ in range(2):
        owner.allocate(ELEMENTS)
    first = owner.offers("peer")
    owner.allocate(ELEMENTS)
    assert (len(first), len(owner.offers("peer")), owner.offers("peer")) == (2, 1, [])
    owner.forget("peer")
    assert len(owner.offers("peer")) == 3


# ---- no lane -------------------------------------------------------------------------------------


def test_beyond_the_limit_payloads_go_through_sockets_and_it_is_said_once(
    said: pytest.LogCaptureFixture,
) -> None:
    owner, peer = Lanes(LaneSettings(is_enabled=True, bytes_max=4 * ELEMENTS)), Lanes(AUTO)
    inside, *outside = (owner.allocate(ELEMENTS) for _ in range(4))
    assert [answer.is_mapped for answer in answers(owner, peer)] == [True]
    assert place(owner, inside).segment
    assert [owner.locate("peer", one) for one in outside] == [None] * 3
    text = f"{8 * ELEMENTS} bytes of shared memory are wanted, lane_bytes_max allows {4 * ELEMENTS}"
    assert said.messages == [f"{SOCKETS}: {text}"]


def test_without_memory_payloads_go_through_sockets_and_it_is_said_once() -> None:
    pid = os.fork()
    if pid == 0:
        told: list[tuple[int, str]] = []
        owner = Lanes(AUTO)
        owner._log.log = lambda *what: told.append(what)  # type: ignore[method-assign] # a child's own
        resource.setrlimit(resource.RLIMIT_FSIZE, (ELEMENTS, ELEMENTS))
        flats = [owner.allocate(ELEMENTS) for _ in range(3)]
        is_usable = all(len(flat.zero_()) == ELEMENTS for flat in flats)
        [(level, text)] = told
        is_told = level == logging.WARNING and text.startswith(f"{SOCKETS}: cannot reserve")
        os._exit(not (is_usable and is_told and owner.offers("peer") == []))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_lane_that_is_switched_off_makes_nothing_and_says_nothing(
    said: pytest.LogCaptureFixture,
) -> None:
    owner = Lanes(OFF)
    assert len(owner.allocate(ELEMENTS)) == ELEMENTS
    assert (owner.offers("peer"), said.messages) == ([], [])


def test_a_peer_that_cannot_read_it_gets_bytes_and_no_more_offers_and_it_is_said_once(
    said: pytest.LogCaptureFixture,
) -> None:
    owner = Lanes(AUTO)
    flats = [owner.allocate(ELEMENTS) for _ in range(2)]
    elsewhere, here = Lanes(AUTO), Lanes(AUTO)
    for offer in owner.offers("elsewhere"):  # its process of that number is another one
        lie = msgspec.structs.replace(offer, token=bytes(16))
        owner.on_answer("elsewhere", elsewhere.on_offer(lie))
    for peer in ("peer", "switched off"):
        end = here if peer == "peer" else Lanes(OFF)
        for offer in owner.offers(peer):
            owner.on_answer(peer, end.on_offer(offer))
    for peer in ("elsewhere", "switched off"):
        assert [owner.locate(peer, one) for one in flats] == [None] * 2
    assert all(place(owner, flat).segment for flat in flats)
    assert owner.local_peers() == ["peer"]
    owner.allocate(ELEMENTS)
    assert [len(owner.offers(peer)) for peer in ("elsewhere", "switched off", "peer")] == [0, 0, 1]
    [text] = said.messages
    assert text.startswith(f"{SOCKETS} to a peer that answers: another process's memory")


# ---- peers that lie ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "elements"),
    [(4, ELEMENTS), (0, ELEMENTS + 1), (4 * ELEMENTS, 1), (1 << 60, 1), (2, 1), (1, 1)],
)
def test_a_payload_outside_of_its_segment_is_refused(offset: int, elements: int) -> None:
    owner, peer = Lanes(AUTO), Lanes(AUTO)
    frame = place_all(owner, peer)
    lie = msgspec.structs.replace(frame, offset=offset, elements=elements)
    with pytest.raises(RemoteProtocolError, match=f"a payload at {offset} to "):
        peer.view(lie)
    assert len(peer.view(frame)) == ELEMENTS


def place_all(owner: Lanes, peer: Lanes) -> Frame:
    """The frame of a whole segment that a peer has mapped."""
    flat = owner.allocate(ELEMENTS)
    answers(owner, peer)
    return place(owner, flat)


def test_a_payload_in_memory_that_was_never_offered_is_refused() -> None:
    peer = Lanes(AUTO)
    frame = place_all(Lanes(AUTO), peer)
    with pytest.raises(RemoteProtocolError, match="which is not mapped here"):
        peer.view(msgspec.structs.replace(frame, segment=frame.segment ^ 1))


def test_a_number_that_is_taken_stays_with_whom_it_belongs_to() -> None:
    owner, other, peer = Lanes(AUTO), Lanes(AUTO), Lanes(AUTO)
    flat = owner.allocate(ELEMENTS)
    flat.fill_(3)
    other.allocate(ELEMENTS)
    [offer], [foreign] = owner.offers("peer"), other.offers("peer")
    assert [peer.on_offer(offer).is_mapped for _ in range(2)] == [True, True]
    lies = [
        msgspec.structs.replace(foreign, segment=offer.segment),
        msgspec.structs.replace(offer, token=bytes(16)),
        msgspec.structs.replace(offer, nbytes=1 << 50),
    ]
    assert [peer.on_offer(lie).is_mapped for lie in lies] == [False] * 3
    frame = Frame(Dtype.FLOAT32, ELEMENTS, 1.0, offer.segment, 0)
    assert torch.equal(peer.view(frame), flat)


def test_there_is_a_limit_for_what_peers_can_make_a_process_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "PEER_SEGMENTS_MAX", 2)
    monkeypatch.setattr(lanes, "PEER_BYTES_MAX", 4 * ELEMENTS)
    owner, peer = Lanes(AUTO), Lanes(AUTO)
    kept = [owner.allocate(count) for count in (ELEMENTS, ELEMENTS + 1, ELEMENTS, ELEMENTS)]
    found = answers(owner, peer)
    assert [answer.is_mapped for answer in found] == [True, False, True, False]
    assert "is too much" in found[1].text
    assert len(kept) == 4


def test_an_answer_that_nobody_asked_for_changes_nothing(said: pytest.LogCaptureFixture) -> None:
    owner, peer = Lanes(AUTO), Lanes(AUTO)
    flat = owner.allocate(ELEMENTS)
    [answer] = answers(owner, peer)
    owner.on_answer("stranger", answer)
    owner.on_answer("peer", SegmentAnswer(answer.segment ^ 1, is_mapped=False, text="no"))
    assert owner.locate("stranger", flat) is None
    assert place(owner, flat).segment == answer.segment
    assert said.messages == []


# ---- ends ----------------------------------------------------------------------------------------


def test_memory_of_a_peer_that_is_gone_is_let_go_of_and_what_is_in_use_is_not() -> None:
    owner, stays, peer = Lanes(AUTO), Lanes(AUTO), Lanes(AUTO)
    frame, other = place_all(owner, peer), place_all(stays, peer)
    used = peer.view(frame)
    owner.close()
    gc.collect()
    peer.sweep()
    with pytest.raises(RemoteProtocolError, match="not mapped"):
        peer.view(frame)
    assert len(peer.view(other)) == len(used) == ELEMENTS
    assert not used.any()


def test_when_both_ends_have_closed_no_memory_is_left() -> None:
    owner, peer = Lanes(AUTO), Lanes(AUTO)
    owner.name = "treefold-test-of-the-end"
    for _ in range(3):
        place_all(owner, peer)
    maps = Path("/proc/self/maps")
    assert maps.read_text(encoding="utf-8").count(owner.name) == 6
    owner.close()
    peer.close()
    gc.collect()
    assert owner.name not in maps.read_text(encoding="utf-8")


# ---- with sockets --------------------------------------------------------------------------------


class Pair:
    """Two carriers and the sockets between them; ``listener`` owns the memory."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.hubs = Hub(self.context), Hub(self.context)
        self.outboxes = Outbox(self.hubs[0]), Outbox(self.hubs[1])
        self.listener, self.link = (Carrier(outbox, AUTO) for outbox in self.outboxes)
        self.hubs[0].listen(
            "at", "inproc://lanes", insecure=False, frame_bytes_max=DATA_FRAME_BYTES_MAX
        )
        self.hubs[1].connect("to", "inproc://lanes", DATA_FRAME_BYTES_MAX)
        self.hubs[1].send("to", None, b"hello")
        [hello] = self.hubs[0].wait(None, 1)
        self.to = Destination("at", hello.sender)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for carrier, hub in ((self.listener, self.hubs[0]), (self.link, self.hubs[1])):
            carrier.lanes.close()
            hub.close()
        self.context.term()

    def send(self, flat: torch.Tensor) -> tuple[Arrival, Pulled]:
        """Send a version of one part and take it from the other socket."""
        message = Pulled(0, 0, 0, 1, 5, frame_of(flat))
        assert self.listener.send(self.to, message, [Payload(flat)])
        arrival = self.arrival(1)
        pulled = decode(arrival.header)
        assert isinstance(pulled, Pulled)
        return arrival, pulled

    def arrival(self, at: int) -> Arrival:
        """What comes next at one of the hubs, once the other one has sent what it has."""
        self.outboxes[1 - at].flush()
        [found] = self.hubs[at].wait(None, 1)
        return found

    def agree(self) -> None:
        """Offer, map and answer."""
        self.listener.offer("at", self.to.peer)
        for at, carrier in ((1, self.link), (0, self.listener)):
            arrival = self.arrival(at)
            message = decode(arrival.header)
            assert isinstance(message, SegmentOffer | SegmentAnswer)
            carrier.on_segment(arrival, message)


def test_a_payload_travels_as_bytes_until_the_peer_has_mapped_it_and_then_as_a_place() -> None:
    with Pair() as pair:
        flat = pair.listener.lanes.allocate(ELEMENTS)
        flat.copy_(torch.arange(ELEMENTS))
        for is_placed in (False, True):
            arrival, pulled = pair.send(flat)
            assert [len(frame) for frame in arrival.payloads] == [4 * ELEMENTS] * (not is_placed)
            received = pair.link.receive(arrival, pulled)
            assert received is not None
            assert torch.equal(pair.link.drop(received[0]).payload.tensor, flat)
            if not is_placed:
                pair.agree()


def parts_of(parts: int, dtype: torch.dtype, scales: list[float]) -> list[Payload]:
    pieces = torch.split(torch.rand(parts * PART + 3, dtype=dtype), PART)
    return [Payload(*one) for one in zip(pieces, scales, strict=True)]


def from_here_and_there() -> list[Payload]:
    return [Payload(torch.rand(PART)) for _ in range(3)]


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (partial(parts_of, 6, torch.float32, [1.0] * 7), [4, 3]),
        (partial(parts_of, 4, torch.float64, [1.0] * 5), [2, 2, 1]),
        (partial(parts_of, 3, torch.float32, [1.0, 0.5, 0.5, 1.0]), [1, 2, 1]),
        (from_here_and_there, [1, 1, 1]),
    ],
    ids=["as much as a frame holds", "of eight bytes", "of several scales", "from here and there"],
)
def test_parts_that_lie_one_after_the_other_leave_in_one_frame(
    make: Callable[[], list[Payload]], counts: list[int]
) -> None:
    payloads = make()
    elements = sum(one.tensor.numel() for one in payloads)
    dtype = Dtype.FLOAT32 if payloads[0].tensor.dtype == torch.float32 else Dtype.FLOAT64
    with Pair() as pair:
        message = Pulled(0, 0, 0, len(payloads), 5, Frame(dtype, elements))
        assert pair.listener.send(pair.to, message, payloads)
        at = 0
        for count in counts:
            [arrival] = pair.hubs[1].wait(None, 1)
            pulled = decode(arrival.header)
            assert isinstance(pulled, Pulled)
            assert (pulled.part, pulled.count, len(arrival.payloads)) == (at, count, 1)
            check_payload(pulled, [arrival.payloads[0].nbytes])
            numbers = pair.link.receive(arrival, pulled)
            assert numbers is not None
            for number, sent in zip(numbers, payloads[at : at + count], strict=True):
                received = pair.link.drop(number).payload
                assert received.tensor.equal(sent.tensor)
                assert received.scale == sent.scale
            at += count


def test_memory_that_only_happens_to_lie_beside_other_memory_is_another_frame() -> None:
    both = bytearray(8 * PART)
    halves = [memoryview(both)[: 4 * PART], memoryview(both)[4 * PART :]]
    payloads = [Payload(torch.frombuffer(half, dtype=torch.float32)) for half in halves]
    assert payloads[1].tensor.data_ptr() == payloads[0].tensor.data_ptr() + 4 * PART
    with Pair() as pair:
        message = Pulled(0, 0, 0, 2, 5, Frame(Dtype.FLOAT32, 2 * PART))
        assert pair.listener.send(pair.to, message, payloads)
        found = [decode(pair.arrival(1).header) for _ in range(2)]
    assert [(one.part, one.count) for one in found if isinstance(one, Pulled)] == [(0, 1), (1, 1)]


def test_bytes_are_counted_by_peer_and_by_the_way_that_they_took() -> None:
    with Pair() as pair:
        flat = pair.listener.lanes.allocate(ELEMENTS)
        headers: list[int] = []
        sent = pair.hubs[0].traffic.to("at", pair.to.peer)
        received = pair.hubs[1].traffic.of("to", "to")
        for is_placed in (False, True):
            arrival, pulled = pair.send(flat)
            pair.link.receive(arrival, pulled)
            headers.append(len(arrival.header))
            if not is_placed:
                assert received == sent == Way(1, headers[0], 4 * ELEMENTS, 0)
                pair.agree()
        assert received == sent
        assert (sent.messages, sent.payload_bytes, sent.shared_bytes) == (3, *[4 * ELEMENTS] * 2)
        assert sent.header_bytes > sum(headers)  # the offer is the third
        answers = pair.hubs[1].traffic.to("to", "to"), pair.hubs[0].traffic.of("at", pair.to.peer)
        assert answers[0] == answers[1]
        assert (answers[0].messages, answers[0].payload_bytes) == (2, 0)


def test_strangers_are_counted_together_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traffic, "PEERS_COUNTED_MAX", 2)
    counts = Traffic()
    for number in range(5):
        counts.of("at", bytes([number])).add(7, 1)
    counts.of("at", b"\1").add(7, 1)
    assert [way.messages for way in counts.received.values()] == [1, 2, 3]
    assert counts.of("at", None) == Way(3, 21, 3, 0)


def test_a_payload_in_memory_that_is_not_mapped_any_more_is_ignored_and_sent_as_bytes_then(
    said: pytest.LogCaptureFixture,
) -> None:
    with Pair() as pair:
        flat = pair.listener.lanes.allocate(ELEMENTS)
        flat.fill_(2)
        pair.agree()
        pair.link.lanes.close()
        assert pair.link.receive(*pair.send(flat)) is None
        assert len(pair.link) == 0
        arrival = pair.arrival(0)
        answer = decode(arrival.header)
        assert isinstance(answer, SegmentAnswer)
        pair.listener.on_segment(arrival, answer)
        received = pair.link.receive(*pair.send(flat))
        assert received is not None
        assert torch.equal(pair.link.drop(received[0]).payload.tensor, flat)
    assert len(said.messages) == 1
    assert "not mapped here" in said.text


@pytest.mark.parametrize("segment", [0, 9])
def test_a_copy_of_no_slices_has_no_payload(segment: int) -> None:
    where = (99, 5, 4, 0, 1, 2, 3, -1, 17)
    nothing = UnitCopy(*where, [], False, b"", 0, 0, 0, Frame(Dtype.FLOAT32, 0, 1.0, segment))
    with pytest.raises(RemoteProtocolError, match="0 elements in 0 parts"):
        check_payload(nothing, [] if segment else [0])
    check_payload(msgspec.structs.replace(nothing, frame=None), [])
