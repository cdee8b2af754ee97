"""Timelines: files that load at any time, that are bounded, and that become one."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from treefold.common import timeline as module
from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.common.process import Spent
from treefold.common.timeline import Timeline, begin, merge, part_of, parts_of
from treefold.transport.sockets import Arrival
from treefold.transport.tally import Tally
from treefold.transport.watch import watch_for
from treefold.wire.exchange import Received, Tick
from treefold.wire.messages import StatusRequest
from treefold.wire.words import Role

ARRIVAL = Arrival("listener", b"peer", b"", [])


def spans(path: Path) -> list[dict[str, object]]:
    """The spans in a file."""
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_the_file_is_whole_json_after_every_write(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    timeline = Timeline(path, 7)
    assert json.loads(path.read_text()) == []
    timeline.own("exchange")
    timeline.name("server-0")
    for number in range(3):
        timeline.span("fold", 1_000 * number, 1_000 * number + 500, {"round": number})
        timeline.write()
        assert [span["ts"] for span in spans(path)] == list(range(number + 1))
    assert spans(path)[2] == {
        "name": "fold", "ph": "X", "ts": 2.0, "dur": 0.5, "pid": 7,
        "tid": threading.get_ident(), "args": {"round": 2},
    }  # fmt: skip
    names = {event["name"]: event["args"]["name"] for event in json.loads(path.read_text())[:2]}
    assert names == {"process_name": "server-0", "thread_name": "exchange"}
    timeline.close()


def test_spans_of_another_thread_are_in_a_lane_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    timeline = Timeline(path, 7)
    timeline.own("exchange")
    other = threading.Thread(target=timeline.span, args=("compute", 0, 1_000))
    timeline.span("push", 0, 1_000)
    other.start()
    other.join()
    timeline.close()
    assert len({span["tid"] for span in spans(path)}) == 2
    lanes = [event["args"]["name"] for event in json.loads(path.read_text()) if event["ph"] == "M"]
    assert lanes == ["exchange", "training"]


def test_a_file_that_is_full_says_so_and_grows_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BYTES_MAX", 2_000)
    path = tmp_path / "t.json"
    timeline = Timeline(path, 7)
    for number in range(100):
        timeline.span("fold", number, number + 1)
        timeline.write()
    assert path.stat().st_size < 2_300
    timeline.close()
    kept = len(spans(path))
    notes = [event["name"] for event in json.loads(path.read_text()) if event["ph"] == "i"]
    assert 0 < kept < 100
    assert notes == [
        "the file is full: nothing of what follows is in it", f"{100 - kept} spans are left out"
    ]  # fmt: skip


def test_a_disk_that_is_full_costs_the_rest_of_the_timeline_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    timeline = Timeline(path, 7)
    timeline.span("fold", 0, 1)
    timeline.write()
    room = path.stat().st_size + 40
    whole = os.pwrite

    def pwrite(file: int, data: bytes, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(file, data[: room - offset], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for number in range(3):
        timeline.span("push", number, number + 1)
        timeline.write()
    timeline.close()
    assert [span["name"] for span in spans(path)] == ["fold"]


def test_spans_that_nobody_writes_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PENDING_MAX", 3)
    path = tmp_path / "t.json"
    timeline = Timeline(path, 7)
    for number in range(5):
        timeline.span("fold", number, number + 1)
    timeline.close()
    assert len(spans(path)) == 3
    assert json.loads(path.read_text())[-1]["name"] == "2 spans are left out"


def test_files_of_processes_become_one_and_are_gone(tmp_path: Path) -> None:
    base = str(tmp_path / "run [1].json")
    old = part_of(base, "server")
    begin(base)
    old.write_text("[\n]\n")
    begin(base)
    assert parts_of(base) == []
    for role in ("scheduler", "server", "worker"):
        timeline = Timeline(part_of(base, role), len(role))
        timeline.span(role, 0, 1)
        timeline.close()
    (tmp_path / "other.json.server-1.json").write_text("[\n]\n")
    assert merge(base) == 3
    assert parts_of(base) == []
    events = json.loads(Path(base).read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == [
        "scheduler", "server", "worker"
    ]  # fmt: skip


def test_a_script_that_begins_anew_in_its_process_writes_another_file(tmp_path: Path) -> None:
    base = str(tmp_path / "run.json")
    for number in range(2):
        timeline = Timeline(part_of(base, "worker"), 1)
        timeline.span(f"span {number}", 0, 1)
        timeline.close()
    assert merge(base) == 2
    events = json.loads(Path(base).read_text())["traceEvents"]
    found = sorted(event["name"] for event in events if event["ph"] == "X")
    assert found == ["span 0", "span 1"]


def test_what_a_killed_process_left_is_merged_as_well(tmp_path: Path) -> None:
    base = str(tmp_path / "run.json")
    timeline = Timeline(part_of(base, "server"), 1)
    timeline.span("fold", 0, 1)
    timeline.write()  # and never closed
    assert merge(base) == 1
    assert len(json.loads(Path(base).read_text())["traceEvents"]) == 2


def test_a_process_that_is_killed_while_it_writes_leaves_a_file_that_loads(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from treefold.common.timeline import Timeline
timeline = Timeline(Path(sys.argv[1]), 1)
for number in range(1 << 40):
    timeline.span("fold", number, number + 1)
    timeline.write()
    if number == 100:
        print("at work", flush=True)
"""
    path = tmp_path / "t.json"
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        process.kill()
    assert len(spans(path)) > 100


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    base = str(tmp_path / "nowhere" / "run.json")
    with pytest.raises(ConfigError, match="timeline"):
        begin(base)
    with pytest.raises(ConfigError, match="timeline"):
        watch_for(Settings(timeline=base), Role.SERVER, Tally({}), lambda: None)


def test_a_watch_writes_what_was_handled_and_what_was_waited_for(tmp_path: Path) -> None:
    base, spent = str(tmp_path / "run.json"), Spent()
    watch = watch_for(
        Settings(timeline=base), Role.SERVER, Tally({StatusRequest: "status"}, spent), lambda: None
    )
    assert watch is not None

    def arrivals() -> Iterator[Arrival]:
        threading.Event().wait(0.001)  # longer than what is left out
        yield ARRIVAL

    assert list(watch.waiting(arrivals())) == [ARRIVAL]
    with spent.on("fold"):
        pass
    watch.handled(Received(b"peer", StatusRequest(7)), [], 0)
    watch.handled(Tick(), [], 0)
    watch.turn()
    watch.close()
    path = tmp_path / f"run.json.server-{os.getpid()}.json"
    assert [span["name"] for span in spans(path)] == ["wait", "fold", "status"]
    with spent.on("fold"):  # nothing is written down any more, and nothing breaks
        pass
