"""What waits to be sent: together to one peer, in order, never lost in silence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from treefold.transport.outbox import Outbox
from treefold.transport.sockets import CONTROL_FRAME_BYTES_MAX, Context, Hub
from treefold.wire.codec import BUNDLE_MAX, decode, decode_all, encode
from treefold.wire.messages import AnyMessage, Fenced, Flush, StatusRequest

SECOND_NS = 1_000_000_000


@dataclass
class Pair:
    """A link's outbox, and the listener that it sends to."""

    outbox: Outbox
    listener: Hub

    def arrivals(self, messages: int) -> list[tuple[list[AnyMessage], list[bytes]]]:
        """So many messages, by what they came in, each with its payload frames."""
        found: list[tuple[list[AnyMessage], list[bytes]]] = []
        while sum(len(each) for each, _ in found) < messages:
            arrived = list(self.listener.wait(10 * SECOND_NS, 64))
            assert arrived, f"{messages} messages were to come, there are {found}"
            for one in arrived:
                payloads = [bytes(payload) for payload in one.payloads]
                found.append((list(decode_all(one.header)), payloads))
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    context = Context()
    listener, link = Hub(context), Hub(context)
    limit = CONTROL_FRAME_BYTES_MAX
    address = listener.listen("door", f"ipc://{tmp_path}/d", insecure=False, frame_bytes_max=limit)
    link.connect("door", address, limit)
    yield Pair(Outbox(link), listener)
    link.close()
    listener.close()
    context.term()


def test_messages_to_one_peer_arrive_together_and_in_order(pair: Pair) -> None:
    sent: list[AnyMessage] = [Flush(1), Fenced(2), StatusRequest(3)]
    for message in sent:
        pair.outbox.send("door", None, message)
    assert list(pair.listener.wait(0, 64)) == []
    pair.outbox.flush()
    assert pair.arrivals(3) == [(sent, [])]
    pair.outbox.flush()
    pair.outbox.send("door", None, Flush(4))
    pair.outbox.flush()
    assert pair.arrivals(1) == [([Flush(4)], [])]


def test_a_payload_leaves_at_once_but_not_before_what_was_queued(pair: Pair) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    pair.outbox.send("door", None, Flush(1))
    frame = values.numpy().data.cast("B")
    pair.outbox.send_frame("door", None, Fenced(2), frame)
    first, second = pair.arrivals(2)
    assert first == ([Flush(1)], [])
    assert second == ([Fenced(2)], [bytes(frame)])


def test_what_is_more_than_a_bundle_holds_leaves_in_several(pair: Pair) -> None:
    for number in range(BUNDLE_MAX + 1):
        pair.outbox.send("door", None, Flush(number))
    pair.outbox.flush()
    sizes = [len(messages) for messages, _ in pair.arrivals(BUNDLE_MAX + 1)]
    assert sizes == [BUNDLE_MAX, 1]


def test_a_peer_that_is_not_there_is_named(pair: Pair) -> None:
    outbox = Outbox(pair.listener)
    outbox.send("door", b"nobody", Flush(1))
    assert outbox.lost == []
    outbox.flush()
    assert outbox.lost == [b"nobody"]


def test_what_is_not_copied_is_in_use_until_it_has_left() -> None:
    nobody = Hub()
    nobody.connect("door", "ipc:///nonexistent/never", CONTROL_FRAME_BYTES_MAX)
    large = torch.zeros(1_000_000).numpy().data.cast("B")
    outbox = Outbox(nobody)
    assert outbox.send_frame("door", None, Flush(1), memoryview(b"small")) == []
    trackers = outbox.send_frame("door", None, Flush(2), large)
    assert trackers is not None
    assert [tracker.done for tracker in trackers] == [False]
    assert outbox.send_frame("door", None, Flush(2), large) == []  # it is on its way
    nobody.disconnect("door")
    for tracker in trackers:
        tracker.wait(10)
    nobody.close()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_link_that_is_closed_for_what_it_brought_brings_nothing_more(
    pair: Pair, is_replaced: bool
) -> None:
    pair.outbox.send("door", None, Flush(0))
    pair.outbox.flush()
    [knock] = pair.listener.wait(10 * SECOND_NS, 64)
    assert isinstance(knock.sender, bytes)
    for number in range(3):
        pair.listener.send("door", knock.sender, encode(Flush(number)))
    link = pair.outbox._hub
    arrivals = link.wait(10 * SECOND_NS, 64)
    first = next(arrivals, None)
    while first is None:  # a wait ends with what happens to a connection, too
        arrivals = link.wait(10 * SECOND_NS, 64)
        first = next(arrivals, None)
    assert decode(first.header) == Flush(0)
    if is_replaced:
        link.connect("door", "tcp://127.0.0.1:9", CONTROL_FRAME_BYTES_MAX)
    else:
        link.disconnect("door")
    assert list(arrivals) == []
