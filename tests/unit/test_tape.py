"""The tape: what is read back, which of several records counts, and what a replay comes to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.shard_jobs import make_spec
from treefold.cli.main import exit_code_of
from treefold.cli.replay import main
from treefold.common import layout, tape
from treefold.common.errors import DataError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import Hyper
from treefold.common.tape import (
    TapeBegun,
    TapeEnd,
    TapeFull,
    TapePart,
    TapeShard,
    TapeStep,
    TapeUnit,
    TapeVersion,
    TapeWriter,
)
from treefold.common.unit_state import encode_header
from treefold.server.digest import checksum
from treefold.server.replay import Replay, Tape, tensors
from treefold.server.shard import FoldedPart, ShardState

ELEMENTS = 8
GROUP: Hyper = {"lr": 0.5, "momentum": 0.5}
SPEC = make_spec("SGD", [GROUP], [([ELEMENTS], 0)])
SPAN = ShardSpan(0, 2)
ROOM = 1 << 20
WRITERS: list[TapeWriter] = []


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Files of servers that die are closed by the system."""
    yield
    while WRITERS:
        WRITERS.pop().close()


class Server:
    """A server that steps a shard and writes its tape."""

    def __init__(self, path: Path, number: int, bytes_max: int = ROOM, job: int = 7) -> None:
        self.state = ShardState(SPEC, SPAN)
        self.writer = TapeWriter(str(path), job, number, bytes_max)
        WRITERS.append(self.writer)
        self.writer.add(TapeShard(0, 0, SPEC, SPAN))
        self.version = 0

    def begin(self, value: float, view: int = 2) -> None:
        """Initial values."""
        values = torch.full((ELEMENTS,), value)
        for part, (start, stop) in enumerate(Layout(SPEC).parts(SPAN)):
            self.state.initialize(part, values[start:stop])
        self._add(view, 0, None, values)

    def step(self, value: float, view: int = 2, *, is_quiet: bool = False) -> None:
        """The next version."""
        self.version += 1
        values = torch.arange(ELEMENTS) * value
        parts = self.state.parts
        folded = [
            FoldedPart(part, values[start:stop].clone(), b"\0")
            for part, (start, stop) in enumerate(parts)
        ]
        self.state.step(folded, [GROUP], 0.5)
        if not is_quiet:
            self._add(view, self.version, [GROUP], values)
            self.writer.add(TapeVersion(0, 0, view, self.version, [(0, self.version % 3, 5)]))

    def _add(
        self, view: int, version: int, groups: list[Hyper] | None, values: torch.Tensor
    ) -> None:
        for part, (start, stop) in enumerate(self.state.parts):
            of = part, b"\0", values[start:stop].clone().numpy().tobytes()
            self.writer.add(TapeStep(0, 0, view, version, groups, 0.5, [TapePart(*of)]))

    def end(self) -> None:
        """The job is over."""
        self.writer.add(TapeEnd(0, 0, self.version, checksum(self.state)))
        self.writer.close()


def replayed(path: Path) -> Replay:
    """The only shard, stepped again."""
    replay = Replay(Tape(str(path)).tracks[0, 0])
    for _ in replay.run():
        pass
    return replay


def test_a_replay_comes_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "run.tape"
    server = Server(path, 3)
    server.begin(1.0)
    for value in (0.1, -0.3, 0.7):
        server.step(value)
    server.end()
    replay = replayed(path)
    assert (replay.begun, replay.version, replay.verdicts()) == (0, 3, [True])
    values = tensors({(0, 0): replay})["t0"]
    assert torch.equal(values, torch.cat([server.state.values(part) for part in (0, 1)]))
    assert main([str(path), "--events"]) == 0
    told = capsys.readouterr().out
    assert "net shard 0 version 2: level 0 index 2 of worker 5" in told
    assert "the same bits as 1 server had" in told


def test_a_replay_that_comes_to_other_bits_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path / "t", 3)
    server.begin(1.0)
    server.step(0.1)
    server.state.values(0)[0] += 1
    server.end()
    assert replayed(tmp_path / "t").verdicts() == [False]
    assert main([str(tmp_path / "t")]) == 1
    assert "NOT what 1 of 1 servers had" in capsys.readouterr().out


def test_of_a_version_that_was_made_twice_the_higher_view_counts(tmp_path: Path) -> None:
    """The first primary dies after a step that nobody else has heard of."""
    first, second = Server(tmp_path / "t", 3), Server(tmp_path / "t", 4)
    first.begin(1.0)
    second.begin(1.0)
    for server in (first, second):
        server.step(0.1)
    first.step(9.0, view=2)
    second.step(-0.3, view=5)
    second.step(0.7, view=5)
    second.end()
    replay = replayed(tmp_path / "t")
    assert (replay.version, replay.verdicts()) == (3, [True])


def test_what_was_before_a_way_back_does_not_count(tmp_path: Path) -> None:
    """A server is lost with the only copy; another one begins with a checkpoint of version 1."""
    lost = Server(tmp_path / "t", 3)
    lost.begin(1.0)
    for value in (0.1, 0.2, 0.3):
        lost.step(value)
    found = Server(tmp_path / "t", 4)
    for part, (start, stop) in enumerate(found.state.parts):
        found.state.initialize(part, torch.ones(stop - start))
    found.step(0.1, is_quiet=True)
    for unit in (0, 1):
        header, flat = found.state.export_unit(unit)
        of = 6, 1, unit, encode_header(header), flat.numpy().tobytes()
        found.writer.add(TapeUnit(0, 0, *of))
    found.step(-5.0, view=6)
    found.end()
    replay = replayed(tmp_path / "t")
    assert (replay.begun, replay.version, replay.verdicts()) == (1, 2, [True])


def test_a_tape_has_an_end_where_there_is_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path / "t", 3, bytes_max=600)
    server.begin(1.0)
    for _ in range(50):
        server.step(0.1)
    assert server.writer.is_full
    server.end()
    (file,) = tape.files(str(tmp_path / "t"))
    assert file.stat().st_size < 700
    records = [entry.record for entry in tape.read(file)]
    assert isinstance(records[0], TapeBegun)
    assert isinstance(records[-1], TapeFull)
    assert 0 < replayed(tmp_path / "t").version < 50
    assert main([str(tmp_path / "t")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "nothing to compare with" in told
    assert "t.server-3 was full" in told


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    server = Server(tmp_path / "t", 3)
    server.begin(1.0)
    server.step(0.1)
    server.writer.close()
    (file,) = tape.files(str(tmp_path / "t"))
    whole = file.read_bytes()
    offsets = [entry.offset for entry in tape.read(file)]
    for size in range(offsets[1], len(whole)):
        file.write_bytes(whole[:size])
        found = [entry.offset for entry in tape.read(file)]
        assert found == [at for at in offsets if at < size and at in found]
        assert len(found) >= sum(at < size for at in offsets) - 1


@pytest.mark.parametrize("damage", [b"\xc1", b"\x93\x01\x02\x03", b"text", b""])
def test_what_is_no_tape_is_refused_by_name(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "t.server-3").write_bytes(damage)
    with pytest.raises(DataError, match=r"t\.server-3"):
        Tape(str(tmp_path / "t"))


def test_there_is_no_tape_or_one_of_several_jobs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tape"):
        Tape(str(tmp_path / "t"))
    for number, job in ((3, 7), (4, 8)):
        Server(tmp_path / "t", number, job=job).begin(1.0)
    with pytest.raises(DataError, match=r"t.server-3, t.server-4 are of different jobs") as error:
        Tape(str(tmp_path / "t"))
    assert exit_code_of(error.value) == 1
    with pytest.raises(FileExistsError):
        Server(tmp_path / "t", 3)


def test_a_tape_that_has_no_beginning_says_so(tmp_path: Path) -> None:
    server = Server(tmp_path / "t", 3)
    server.step(0.1)
    with pytest.raises(DataError, match="no first version of table 'net'"):
        Replay(Tape(str(tmp_path / "t")).tracks[0, 0])
