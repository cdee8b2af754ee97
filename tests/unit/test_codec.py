"""The codec: the bytes of every message pinned, and nothing but typed errors for all other bytes.

The golden bytes are in ``golden/messages.json``, in hexadecimal by message name. A message that is
appended to gets new bytes there; bytes that changed otherwise break clusters of mixed versions.
"""

import json
import math
import random
import tracemalloc
from enum import IntEnum
from pathlib import Path
from typing import get_args

import msgpack
import msgspec
import pytest

from treefold.common.errors import RemoteProtocolError
from treefold.common.layout import BLOCK_ELEMENTS, PART_BLOCKS_MAX
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.wire import chain, decisions, words
from treefold.wire import messages as m
from treefold.wire.codec import (
    BUNDLE_MAX,
    HEADER_BYTES_MAX,
    check_payload,
    decode,
    decode_all,
    encode,
    encode_all,
)
from treefold.wire.probes import Probe, ProbeSeen
from treefold.wire.segments import SegmentAnswer, SegmentOffer

GOLDEN: dict[str, str] = json.loads(
    (Path(__file__).parent / "golden" / "messages.json").read_text(encoding="utf-8")
)

TENSORS = [
    TensorSpec("layer.weight", [10, 64], Dtype.BFLOAT16, 0),
    TensorSpec("norm.running_mean", [10], Dtype.FLOAT32, -1),
]
ADAMW = OptimizerSpec("AdamW", [{"lr": 0.001, "betas": [0.9, 0.999], "amsgrad": False}])
TABLE = TableSpec("model", Rule.OPTIMIZER, Placement.ELEMENTWISE, TENSORS, ADAMW)
PLAN = LoopPlan(PlanKind.SLOTS, 2, 8, 4, 8, 1797, 512, -3, shuffle=True, seed=11)
MEMBER = words.Member(words.Role.SERVER, 1, 5, "tcp://10.0.0.2:4001", "node-2", 4242, "k" * 40, 3)
PLACE = words.TablePlace(
    0,
    "model",
    6,
    [words.ShardPlace(0, 3, 0, 4, 5), words.ShardPlace(1, 3, 4, 3, 7, 4, [5], [9])],
    words.Source("ckpt", 200),
)
LENT = words.Frame(Dtype.FLOAT32, 262_144 + 3, 0.25, 1 << 61, 4096)

EXAMPLES: list[m.AnyMessage] = [
    m.Register(2, words.Role.WORKER, 123456789, "", "node-1", 4711, "0.1.0", 2, 4),
    m.Registered(123456789, 99, 6, 0, 500, 2000, 2, 4, "ckpt", 200),
    m.Refused(12, words.Code.SPEC_MISMATCH, "tensors: 2 entries here, 1 there"),
    m.Heartbeat(
        6,
        3,
        1,
        17,
        2_500_000,
        4096,
        0.25,
        "model shard 0",
        1 << 28,
        97.5,
        {"fold": 5},
        [(0, 16, 1.5)],
        2,
        [(0, 6, [5, 0, 3])],
        metrics="10.0.0.2:9100",
        facts=words.Facts("0.1.0", "3.11.2", "2.13.0", 1024, 1 << 33, 1_700_000_000_000_000_000),
        logged=[("accuracy", 16, 0.5)],
        figures=[words.Figure(0, 1, 2, 1, 65_536, 0.5, 2.0, -1.0, 1.0)],
    ),
    m.HeartbeatSeen(6, 3, 3, True),
    m.DeclareTable(6, 1, TABLE, b"record"),
    m.DeclarePlan(6, 2, PLAN),
    m.Accepted(1, 0),
    m.View(
        3, words.Phase.RUNNING, 6, [MEMBER], [PLACE], words.Leases(9, [6, 6]), words.Leases(-1, [])
    ),
    m.AssignTable(0, TABLE),
    m.Leave(6, words.Outcome.FAILED, "ValueError: größer als erlaubt"),
    m.RoundLate(5, 17, [2, 3, 7]),
    m.Grant(17, [2, 3]),
    m.Flush(17),
    decisions.NormReport(5, 0, 1, 17, [0.5, 1e300, 0.0]),
    decisions.NormDecision(0, 17, 1.5),
    m.StatusRequest(7, True),
    m.StatusReply(7, b'{"round":17}'),
    m.Stop(words.Outcome.DONE, ""),
    m.Fenced(6),
    m.ChainSynced(5, 0, 1, 4, 7),
    m.ChainDiffers(5, 0, 1, 4, 7),
    m.LeaveAsked(6),
    m.DrainRequest(7, "server-1", 5),
    m.Push(99, 6, 3, 0, 1, 2, 2, 17, 8, 1, 3, [b"\x02", b"\x00"], LENT),
    m.RoundHyper(99, 6, 3, 0, 1, 17, 8, [{"lr": 0.01, "foreach": None}], 1.0),
    m.RoundMeta(
        99,
        6,
        3,
        0,
        1,
        17,
        8,
        [{"lr": 0.01, "foreach": None}],
        1.0,
        b"\x80",
        2,
        9,
        8,
        True,
        3,
        32,
        96,
    ),
    m.Pull(99, 6, 3, 0, 1, 18, 2, [0, 4], words.Need(3, 17, 12, 5, 8)),
    m.Pulled(0, 1, 0, 1, 18, words.Frame(Dtype.FLOAT16, 3)),
    m.Published(0, 1, 18, b"\x80", math.inf),
    m.RoundStatus(0, 1, 17, [m.PartMissing(0, [2, 3])], is_meta_missing=True),
    chain.ChainRound(
        99, 5, 4, 0, 1, 17, 8, [{"lr": 0.01}], 1.0, 1.5, b"\x80", [0, 2], [(3, 0, 6)], True
    ),
    chain.ChainAsk(99, 5, 4, 0, 1),
    chain.ChainApplied(99, 7, 4, 0, 1, 3, 18, b"digest", (17, 3, 6)),
    chain.UnitCopy(
        99,
        5,
        4,
        0,
        1,
        2,
        3,
        18,
        17,
        [chain.KeptVersion(17, b"\x80", 1.5)],
        True,
        b"header",
        3,
        0,
        1,
        words.Frame(Dtype.FLOAT32, 262_144),
    ),
    chain.UnitTaken(99, 7, 4, 0, 1, 2, 3, 18),
    SegmentOffer(1 << 61, 4711, 12, 1 << 20, b"sixteen bytes..."),
    SegmentAnswer(1 << 61, is_mapped=False, text="not on this host"),
    m.ShardSaved(
        5, 0, 1, 200, "00000200/t0.model-1-63-5.safetensors", 4096, b"d" * 32, b"", math.inf
    ),
    m.SavedSeen(0, 1, 200),
    decisions.QuorumReport(5, 0, 1, 17, [0, 2, 3], 4, 12, 9),
    decisions.QuorumDecision(17, [0, 2, 3]),
    Probe(7, 3, b"abc"),
    ProbeSeen(7, b"abc"),
    decisions.HealthReport(
        5, 0, 1, 17, [6, 7], [16, 12], 28, [(2, 1, [1.5, 0.25]), (0, 8, [0.0, 2.0])], [0.5, -1.0]
    ),
    decisions.HealthDecision(0, 17, [1.0, 0.0], 1.75, [0.5, -1.0, 0.25]),
]
BY_NAME = pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
BUNDLED: list[m.AnyMessage] = [m.Flush(17), m.Fenced(6)]
HEADERS = [*(encode(message) for message in EXAMPLES), encode_all(BUNDLED)]


def plain(value: object) -> object:
    """A message as the page `docs/wire.md` describes it: arrays of numbers, texts and bytes."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = [plain(getattr(value, name)) for name in value.__struct_fields__]
        return fields if tag is None else [tag, *fields]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, IntEnum):
        return int(value)
    return value


def test_every_message_has_an_example_and_golden_bytes() -> None:
    known = {kind.__name__ for kind in get_args(m.AnyMessage)}
    defined = {kind.__name__ for kind in words.Message.__subclasses__()}
    assert known | {"Bundle"} == defined == set(GOLDEN)
    assert known == {type(message).__name__ for message in EXAMPLES}


def test_no_two_messages_have_one_tag() -> None:
    tags = [str(kind.__struct_config__.tag) for kind in words.Message.__subclasses__()]
    assert sorted(tags) == sorted(set(tags))


@BY_NAME
def test_a_message_has_the_bytes_that_it_always_had(message: m.AnyMessage) -> None:
    assert encode(message).hex() == GOLDEN[type(message).__name__]


def test_messages_that_leave_together_have_the_bytes_that_they_always_had() -> None:
    assert encode_all(BUNDLED).hex() == GOLDEN["Bundle"]
    assert msgpack.unpackb(encode_all(BUNDLED)) == [50, [plain(message) for message in BUNDLED]]
    assert list(decode_all(encode_all(BUNDLED))) == BUNDLED
    assert encode_all(BUNDLED[:1]) == encode(BUNDLED[0])
    assert list(decode_all(encode(BUNDLED[0]))) == BUNDLED[:1]


def test_a_bundle_is_no_single_message_and_holds_no_bundle() -> None:
    with pytest.raises(RemoteProtocolError, match="2 messages where one is expected"):
        decode(encode_all(BUNDLED))
    inner = msgpack.unpackb(encode_all(BUNDLED))
    for wrong in ([inner], [], [plain(BUNDLED[0])] * (BUNDLE_MAX + 1)):
        with pytest.raises(RemoteProtocolError, match="not a message"):
            decode_all(msgpack.packb([50, wrong]))


@BY_NAME
def test_golden_bytes_decode_to_the_message(message: m.AnyMessage) -> None:
    assert decode(bytes.fromhex(GOLDEN[type(message).__name__])) == message


@BY_NAME
def test_another_library_reads_the_golden_bytes_alike(message: m.AnyMessage) -> None:
    assert msgpack.unpackb(bytes.fromhex(GOLDEN[type(message).__name__])) == plain(message)


@BY_NAME
def test_another_library_writes_what_we_decode(message: m.AnyMessage) -> None:
    assert decode(msgpack.packb(plain(message))) == message


@BY_NAME
def test_a_field_that_a_newer_peer_appended_is_passed_over(message: m.AnyMessage) -> None:
    fields = msgpack.unpackb(encode(message))
    assert decode(msgpack.packb([*fields, "from the future"])) == message


@BY_NAME
def test_a_message_with_a_field_too_few_is_refused(message: m.AnyMessage) -> None:
    fields = msgpack.unpackb(encode(message))
    required = len(fields) - len(message.__struct_defaults__)
    with pytest.raises(RemoteProtocolError, match="at least length"):
        decode(msgpack.packb(fields[: required - 1]))


@BY_NAME
def test_a_field_that_an_older_peer_does_not_know_takes_its_default(message: m.AnyMessage) -> None:
    fields = msgpack.unpackb(encode(message))
    required = len(fields) - len(message.__struct_defaults__)
    older = plain(decode(msgpack.packb(fields[:required])))
    newest = plain(type(message)(*msgspec.structs.astuple(message)[: required - 1]))
    assert older == newest


@BY_NAME
def test_bytes_after_a_message_are_refused(message: m.AnyMessage) -> None:
    with pytest.raises(RemoteProtocolError, match="trailing"):
        decode(encode(message) + b"\x00")


PUSH = msgpack.unpackb(HEADERS[24])


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        (1, -1, r">= 0"),
        (1, 1 << 63, r"<= 46116"),
        (1, True, r"Expected `int`, got `bool`"),
        (1, "6", r"Expected `int`, got `str`"),
        (4, 1024, r"<= 1023"),
        (5, 1 << 20, r"<= 1048575"),
        (7, 0, r">= 1"),
        (7, 1_025, r"<= 1024"),
        (8, -2, r">= -1"),
        (9, 0, r">= 1"),
        (9, 65_537, r"<= 65536"),
        (10, 17, r"<= 16"),
        (11, 65_536, r"<= 65535"),
        (12, b"\x02", r"Expected `array`, got `bytes`"),
        (12, [bytes((1 << 17) + 1)], r"length <= 131072"),
        (12, [b""] * 1_025, r"length <= 1024"),
        (13, [9, 3], r"Invalid enum value 9"),
        (13, [1, -1], r">= 0"),
        (13, [1, 3, "1.0"], r"Expected `float`, got `str`"),
        (13, [1, 3, 1.0, -1], r">= 0"),
        (13, [1, 3, 1.0, 1, -4], r">= 0"),
    ],
)
def test_a_push_outside_its_limits_is_refused_by_field(
    field: int, value: object, complaint: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode(msgpack.packb([*PUSH[:field], value, *PUSH[field + 1 :]]))


def test_text_that_is_not_utf_8_is_refused() -> None:
    header = encode(m.Stop(words.Outcome.DONE, "abc")).replace(b"abc", b"\xff\xff\xff")
    with pytest.raises(RemoteProtocolError, match="utf-8"):
        decode(header)


def test_a_plan_that_makes_no_sense_is_refused() -> None:
    fields = msgpack.unpackb(HEADERS[6])
    fields[3][3] = 5
    with pytest.raises(RemoteProtocolError, match="5 rounds; 1797 samples in rounds of 512 make 4"):
        decode(msgpack.packb(fields))


class Unreadable(bytes):
    """A header of which only the length may be asked."""

    def __len__(self) -> int:
        return HEADER_BYTES_MAX + 1


def test_a_header_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match=f"{HEADER_BYTES_MAX + 1} bytes, at most"):
        decode(Unreadable())


def test_a_caller_can_lower_the_limit() -> None:
    header = encode(m.Flush(17))
    assert decode(header, bytes_max=len(header)) == m.Flush(17)
    with pytest.raises(RemoteProtocolError, match=f"at most {len(header) - 1}"):
        decode(header, bytes_max=len(header) - 1)


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff", id="four billion fields claimed"),
        pytest.param(b"\x92\x12\xc6\xff\xff\xff\xff", id="four billion bytes claimed"),
        pytest.param(b"\x91" * 1_000_000, id="a million levels deep"),
        pytest.param(
            HEADERS[21][:9] + b"\xdd\x00\x40\x00\x00" + b"\x80" * (1 << 22), id="empty groups"
        ),
        pytest.param(b"\xdc\xff\xff" + b"\xc0" * 65_535, id="many nothings"),
    ],
)
def test_a_small_header_cannot_make_us_allocate_much(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


class Mutator:
    """Endless headers that are almost right, or not at all, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def header(self) -> bytes:
        """The next one."""
        base = self.random.choice(HEADERS)
        kind = self.random.choice(
            (self.noise, self.flip, self.flip, self.cut, self.insert, self.splice, self.refill)
        )
        return kind(base)

    def noise(self, base: bytes) -> bytes:
        return self.random.randbytes(self.random.randrange(len(base) + 1))

    def flip(self, base: bytes) -> bytes:
        changed = bytearray(base)
        for _ in range(self.random.randint(1, 3)):
            changed[self.random.randrange(len(changed))] = self.random.getrandbits(8)
        return bytes(changed)

    def cut(self, base: bytes) -> bytes:
        return base[: self.random.randrange(len(base))]

    def insert(self, base: bytes) -> bytes:
        at = self.random.randrange(len(base))
        return base[:at] + self.random.randbytes(self.random.randint(1, 6)) + base[at:]

    def splice(self, base: bytes) -> bytes:
        other = self.random.choice(HEADERS)
        return base[: self.random.randrange(len(base))] + other[self.random.randrange(len(other)) :]

    def refill(self, base: bytes) -> bytes:
        """The right tag and number of fields, the rest left to chance."""
        return base[:2] + self.random.randbytes(len(base) - 2)


@pytest.mark.slow
def test_random_and_mutated_headers_are_messages_or_typed_errors(headers: int) -> None:
    mutator, accepted, refused = Mutator(seed=1), 0, 0
    for _ in range(headers):
        header = mutator.header()
        try:
            message = decode(header)
        except RemoteProtocolError:
            refused += 1
            continue
        accepted += 1
        assert encode(decode(encode(message))) == encode(message)
    assert accepted + refused == headers
    assert min(accepted, refused) > headers // 100, "mutations must reach both sides of the border"


def test_a_decoder_without_limits_accepts_what_ours_refuses() -> None:
    """The negative control: plain MessagePack takes the push of a negative slot for a message."""
    header = msgpack.packb([*PUSH[:11], -1, *PUSH[12:]])
    assert msgspec.msgpack.decode(header)[11] == -1
    with pytest.raises(RemoteProtocolError):
        decode(header)


FULL = PART_BLOCKS_MAX * BLOCK_ELEMENTS
WITH_FRAME = m.Pulled(0, 1, 0, 1, 18, words.Frame(Dtype.FLOAT32, 3))
OF_A_RUN = m.Pulled(0, 1, 0, 2, 18, words.Frame(Dtype.FLOAT32, FULL + 3))
IN_A_SEGMENT = m.Pulled(0, 1, 0, 2, 18, words.Frame(Dtype.FLOAT32, FULL + 3, 1.0, 9, 0))
WITHOUT_FRAME = m.Push(99, 6, 3, 0, 1, 2, 1, 17, 8, 1, 3, [b"\x01"], None)


@pytest.mark.parametrize(
    ("message", "payload_bytes"),
    [
        (WITH_FRAME, []),
        (WITH_FRAME, [11]),
        (WITH_FRAME, [13]),
        (WITH_FRAME, [12, 12]),
        (OF_A_RUN, [4 * FULL, 12]),
        (OF_A_RUN, [4 * FULL]),
        (IN_A_SEGMENT, [4 * FULL, 12]),
        (WITHOUT_FRAME, [0]),
        (m.Flush(17), [8]),
    ],
)
def test_a_payload_of_another_size_than_announced_is_refused(
    message: m.AnyMessage, payload_bytes: list[int]
) -> None:
    with pytest.raises(RemoteProtocolError, match="announced"):
        check_payload(message, payload_bytes)


@pytest.mark.parametrize(
    ("message", "payload_bytes"),
    [
        (WITH_FRAME, [12]),
        (OF_A_RUN, [4 * (FULL + 3)]),
        (IN_A_SEGMENT, []),
        (WITHOUT_FRAME, []),
        (m.Flush(17), []),
    ],
)
def test_a_payload_of_the_announced_size_is_accepted(
    message: m.AnyMessage, payload_bytes: list[int]
) -> None:
    check_payload(message, payload_bytes)


@pytest.mark.parametrize(
    ("count", "elements"), [(1, FULL + 1), (2, FULL), (2, 2 * FULL + 1), (3, FULL + 3)]
)
@pytest.mark.parametrize("segment", [0, 9])
def test_a_run_that_cannot_have_so_many_elements_is_refused(
    count: int, elements: int, segment: int
) -> None:
    frame = words.Frame(Dtype.FLOAT32, elements, 1.0, segment)
    with pytest.raises(RemoteProtocolError, match=f"{elements} elements in {count} parts"):
        check_payload(m.Pulled(0, 1, 0, count, 18, frame), [])


def test_a_longest_run_of_full_parts_is_within_the_limit_of_a_payload() -> None:
    elements = words.RUN_PARTS_MAX * FULL
    frame = words.Frame(Dtype.FLOAT32, elements)
    assert frame.nbytes == words.RUN_BYTES_MAX
    message = m.Pulled(0, 1, 0, words.RUN_PARTS_MAX, 18, words.Frame(Dtype.FLOAT64, elements))
    with pytest.raises(RemoteProtocolError, match="at most"):
        check_payload(message, [])


def test_only_pushes_and_pulled_and_copied_parts_announce_a_payload() -> None:
    described = {kind.__name__ for kind in get_args(m.AnyMessage) if "frame" in fields_of(kind)}
    assert described == {"Push", "Pulled", "UnitCopy"}


def fields_of(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Names of a message's fields."""
    return kind.__struct_fields__


def test_tags_of_the_protocol_before_are_not_used_again() -> None:
    tags = [str(kind.__struct_config__.tag) for kind in words.Message.__subclasses__()]
    assert not {32, 35} & set(tags)
