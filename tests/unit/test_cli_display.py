"""What is shown: progress, status, checks. Nothing here runs a cluster."""

import io
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from treefold.cli import doctor
from treefold.cli.display import PLAIN_NS, Display, Meter, PlainView, Progress, display_on
from treefold.cli.doctor import CheckError
from treefold.cli.live import LiveView
from treefold.cli.status import say_who_is_here
from treefold.cli.tables import print_status
from treefold.common.errors import RemoteProtocolError
from treefold.common.spans import spans
from treefold.launch.link import Status, parse
from treefold.launch.processes import Line

SECOND = 1_000_000_000


def member(name: str, **changes: object) -> dict[str, object]:
    """One member of a status document."""
    role, _, rank = name.partition("-")
    fields: dict[str, object] = {
        "name": name, "role": role, "rank": int(rank), "incarnation": hash(name) % 1000,
        "state": "live", "host": "here", "pid": 100 + int(rank), "address": "", "seen_ms_ago": 200,
        "slots": [], "round": 12, "slot_time_ms": 2.5, "samples": 0, "loss": None, "waiting": "",
        "rss_bytes": 3 << 20, "cpu_percent": 50.0,
    }  # fmt: skip
    return fields | changes


def document(*members: dict[str, object], **changes: object) -> Status:
    """A status of a job with one table."""
    shards = [{"shard": n, "server": "server-0", "first_block": n, "blocks": 1} for n in range(2)]
    table = {
        "name": "model", "rule": "optimizer", "optimizer": "AdamW", "tensors": 3,
        "elements": 1234, "shards": shards,
    }  # fmt: skip
    plan = {
        "kind": "slots", "epoch": 1, "first_round": 0, "end_round": 40, "batch_size": 16,
        "samples": 640,
    }  # fmt: skip
    fields: dict[str, object] = {
        "phase": "running", "view": 5, "job": 1, "expected": {"servers": 1, "workers": 2},
        "round": 12, "rounds_per_second": 3.5, "slots": 8, "plan": plan, "members": members,
        "tables": [table], "ending": None,
    }  # fmt: skip
    return parse(msgspec.json.encode(fields | changes))


def progress(round_: int, headline: str = "1 servers, 2 workers") -> Progress:
    """Progress at a round."""
    return Progress(headline, round_, 40, 1, 1234.5, 0.25, [])


# ---- progress ------------------------------------------------------------------------------------


def test_who_is_live_on_a_host_is_named_and_nobody_is_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = document(
        member("server-0"), member("worker-1", host="there"), member("worker-2", state="dead")
    )
    assert say_who_is_here(known, "here") == 0
    assert capsys.readouterr().out.startswith("here: server-0 of view ")
    gone = document(member("worker-2", state="dead"))
    assert say_who_is_here(gone, "here") == 1
    assert capsys.readouterr().out == "here: no live member\n"


def test_speed_is_a_mean_of_the_last_seconds_and_the_total_adds_up() -> None:
    meter = Meter()
    first = document(member("worker-0", samples=100), member("worker-1", samples=100))
    later = document(member("worker-0", samples=300), member("worker-1", samples=200))
    assert meter.read(0, first, {}).speed == 0.0
    seen = meter.read(2 * SECOND, later, {})
    assert [row.speed for row in seen.rows] == [100.0, 50.0]
    assert seen.speed == 150.0


def test_a_scheduler_that_began_anew_and_knows_no_samples_yet_does_not_make_workers_fast() -> None:
    meter = Meter()
    speeds = [
        meter.read(at * SECOND, document(member("worker-0", samples=count)), {}).speed
        for at, count in enumerate([1000, 1100, 0, 1300])
    ]
    assert speeds == [0.0, 100.0, 0.0, 100.0]


def test_old_samples_do_not_count_for_the_speed() -> None:
    meter = Meter()
    samples = [0, 1000, 1010, 1020, 1030, 1040]
    reads = [
        meter.read(at * 2 * SECOND, document(member("worker-0", samples=count)), {})
        for at, count in enumerate(samples)
    ]
    assert reads[-1].speed == 5.0


def test_the_loss_of_all_is_weighed_by_slots() -> None:
    heavy = member("worker-0", loss=1.0, slots=[0, 1, 2])
    light = member("worker-1", loss=5.0, slots=[3])
    silent = member("worker-2", slots=[4, 5])
    assert Meter().read(0, document(heavy, light, silent), {}).loss == 2.0


def test_workers_are_shown_under_the_names_that_the_launcher_gave_them() -> None:
    status = document(member("worker-0"), member("worker-1"), member("worker-2", state="dead"))
    rows = Meter().read(0, status, {100: "worker-1", 101: "worker-0"}).rows
    assert [row.name for row in rows] == ["worker-0", "worker-1"]


def test_without_a_terminal_progress_is_a_line_only_now_and_then_and_if_there_was_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, now = io.StringIO(), iter([n * PLAIN_NS for n in (1, 1.5, 2, 3, 4)])
    monkeypatch.setattr("time.monotonic_ns", lambda: next(now))
    view = PlainView(out, io.StringIO())
    for round_ in (1, 2, 3, 3, 4):
        view.show(progress(round_))
    assert out.getvalue().splitlines() == [
        f"treefold | epoch 1, round {round_} of 40, 1,234 samples/s, loss 0.2500"
        for round_ in (1, 3, 4)
    ]


def test_of_own_loaders_the_round_and_the_loss_are_shown() -> None:
    assert Progress("", 12, 0, 0, 0.0, 0.25, []).summary == "round 12, loss 0.2500"


def test_before_training_the_line_says_who_is_there() -> None:
    status = document(member("server-0"), member("worker-0"), phase="forming", round=0)
    seen = Meter().read(0, status, {})
    assert seen.headline == "forming: 1 of 1 servers, 1 of 2 workers"


def test_on_a_terminal_there_is_a_line_per_worker_and_a_total() -> None:
    out = Terminal()
    view = LiveView(out, io.StringIO())
    rows = [
        member("worker-0", slots=[0, 1, 2, 3], loss=0.5),
        member("worker-1", waiting="round 12"),
    ]
    view.show(Meter().read(0, document(*rows), {}))
    view.write("worker-0 | hello", is_error=False)
    view.close()
    text = out.getvalue()
    assert "worker-0" in text
    assert "0-3" in text
    assert "round 12" in text
    assert "total: epoch 1, round 12 of 40" in text
    assert "worker-0 | hello" in text


def test_errors_stay_apart_if_they_go_elsewhere_than_the_terminal() -> None:
    error = io.StringIO()
    view = LiveView(Terminal(), error)
    view.write("worker-0 | oops", is_error=True)
    view.close()
    assert error.getvalue() == "worker-0 | oops\n"


def test_a_display_suits_where_it_is_shown() -> None:
    plain = display_on(io.StringIO(), io.StringIO())
    with plain:
        plain.started("ipc:///x")
        plain.line(Line("worker-0", "hello", is_error=False))
        plain.event("something")
        plain.ended(7)
    live = display_on(Terminal(), io.StringIO())
    with live:
        assert isinstance(live._view, LiveView)
    assert isinstance(plain._view, PlainView)
    text = plain._view._out.getvalue()  # type: ignore[attr-defined] # the StringIO from above
    first, second, third, last = text.splitlines()
    assert first == "scheduler ipc:///x"
    assert second == "worker-0 | hello"
    assert third == "treefold | something"
    assert last.startswith("treefold | ended with exit code 7 after ")


class Terminal(io.StringIO):
    """A file that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


# ---- status --------------------------------------------------------------------------------------


def shown(status: Status) -> str:
    """What `treefold status` prints of a document."""
    out = io.StringIO()
    print_status(status, Console(file=out, width=160))
    return out.getvalue()


def test_a_status_says_who_is_there_what_is_where_and_what_is_waited_for() -> None:
    text = shown(
        document(
            member("server-0", waiting="slots 3 of round 12"),
            member("worker-0", slots=[0, 1, 2, 5], samples=1000),
        )
    )
    assert "running, view 5, round 12 of 40 (epoch 1); 8 slots, 3.5 rounds/s" in text
    assert "here:100" in text
    assert "0-2 5" in text
    assert "model 0-1" in text
    assert "table model: 3 tensors, 1,234 elements, AdamW; shards 0 on server-0" in text
    assert "server-0 waits for slots 3 of round 12" in text


def test_a_status_says_where_metrics_are_if_they_are_offered() -> None:
    assert "http://h:1/metrics" in shown(document(metrics="h:1"))
    assert "metrics" not in shown(document())


def test_a_status_of_a_cluster_that_forms_says_who_is_missing() -> None:
    text = shown(document(member("server-0"), phase="forming", plan=None, slots=0))
    assert "1 of 1 servers and 0 of 2 workers are there" in text


def test_a_status_of_a_job_that_has_ended_says_how() -> None:
    text = shown(document(ending={"outcome": "failed", "text": "server-0 fell silent"}))
    assert "failed: server-0 fell silent" in text


def test_a_status_of_another_version_is_refused_with_what_is_missing() -> None:
    with pytest.raises(RemoteProtocolError, match="missing required field"):
        parse(json.dumps({"phase": "running"}).encode())


def test_numbers_are_shown_in_few_words() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert spans([]) == ""


# ---- doctor --------------------------------------------------------------------------------------


def test_the_doctor_finds_nothing_wrong_with_this_installation() -> None:
    doctor.check_python()
    doctor.check_packages()
    doctor.check_namespace()
    doctor.check_folder()
    doctor.check_loopback()


def test_the_doctor_prints_what_to_change_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise CheckError("it is broken", "mend it")

    assert doctor.examine({"good": lambda: "fine", "bad": fail}) == 1
    assert capsys.readouterr().out == (
        "ok    good  fine\nFAIL  bad   it is broken\n            mend it\n"
    )


@pytest.mark.parametrize("stray", ["treefold.py", "treefold/__init__.py"])
def test_the_doctor_finds_what_hides_the_package(tmp_path: Path, stray: str) -> None:
    file = tmp_path / stray
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(CheckError, match="hides the package"):
        doctor.check_namespace([str(tmp_path)])


def test_the_doctor_finds_each_thing_that_is_not_as_it_must_be(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"Python 3\.10"):
        doctor.check_python((3, 10))
    with pytest.raises(CheckError, match="not installed: no-such-package"):
        doctor.check_packages(["no-such-package"])
    with pytest.raises(CheckError, match="ulimit -n 1024"):
        doctor.check_files((256, 4096))
    with pytest.raises(CheckError, match="TMPDIR"):
        doctor.check_folder(str(tmp_path / "nowhere"))
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    with pytest.raises(CheckError, match="bytes long"):
        doctor.check_folder(str(deep))
    with pytest.raises(CheckError, match="loopback"):
        doctor.check_loopback("192.0.2.1")


def test_a_display_that_nobody_reads_asks_the_launcher_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    heard: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", heard.append)
    with os.fdopen(writing, "w", encoding="utf-8") as out:
        monkeypatch.setattr("sys.stdout", out)
        display = Display(PlainView(out, io.StringIO()))
        display.event("one")
        display.event("two")
    assert heard == [signal.SIGHUP]
