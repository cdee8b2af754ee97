"""``treefold top`` without a cluster: rates, what fits a terminal, lines of JSON, exit codes."""

import io
import json

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.unit.test_cli_display import SECOND, document, member
from treefold.cli import top
from treefold.cli.rates import Lens, Look
from treefold.cli.screen import BAR_CELLS, drawn, shared_out
from treefold.cli.top import EVERY_NS, GONE_NS, Lines, Screen, Tables, Watch
from treefold.common.errors import UnavailableError
from treefold.launch.link import Status

ADDRESS = "tcp://here:1"
CHECKPOINT = {"folder": "kept", "newest": 10, "saving": 0, "source": None}


def events(*numbers: int) -> list[dict[str, object]]:
    """Some events."""
    return [{"number": n, "at": float(n), "text": f"event {n} came"} for n in numbers]


def busy(spent: float, **changes: object) -> dict[str, object]:
    """A worker that has computed for so long, and waited half as long."""
    times = {"compute": spent, "wait": 0.25 * spent, "await": 0.25 * spent, "fold": 100.0}
    fields = {"seen_ms_ago": 0, "spent_s": times, "slots": [0, 1, 3], **changes}
    return member("worker-0", **fields)


def cluster(workers: int, servers: int = 1, tables: int = 1, **changes: object) -> Status:
    """A status of many members."""
    some = [member(f"server-{n}", incarnation=1000 + n) for n in range(servers)]
    some += [
        member(f"worker-{n}", incarnation=n, slots=[n], samples=100, waiting=f"slot {n}")
        for n in range(workers)
    ]
    one = msgspec.to_builtins(document().tables[0])
    known = [one | {"name": f"table-{n}"} for n in range(tables)]
    return document(*some, tables=known, events=events(*range(1, 41)), **changes)


def look(status: Status) -> Look:
    """A first look."""
    return Lens(ADDRESS).look(0, 0.0, status)


def text(found: Look, height: int | None = None) -> list[str]:
    """The lines of a look."""
    return [line.plain for line in drawn(found, height)]


# ---- rates ---------------------------------------------------------------------------------------


def test_shares_of_time_are_those_between_two_reports() -> None:
    lens = Lens(ADDRESS)
    first = lens.look(0, 0.0, document(busy(10.0)))
    assert first.workers[0].shares == {}
    second = lens.look(2 * SECOND, 2.0, document(busy(11.0)))
    assert second.workers[0].shares == {"compute": 0.5, "push": 0.0, "pull": 0.0, "wait": 0.25}


def test_a_share_is_of_the_time_between_reports_and_not_between_questions() -> None:
    lens = Lens(ADDRESS)
    lens.look(0, 0.0, document(busy(10.0)))
    late = document(busy(11.0, seen_ms_ago=500))
    assert lens.look(5 * SECOND // 2, 2.5, late).workers[0].shares["compute"] == 0.5


def test_shares_follow_the_last_seconds() -> None:
    lens = Lens(ADDRESS)
    spent = [0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    looks = [lens.look(n * SECOND, 0.0, document(busy(s))) for n, s in enumerate(spent)]
    assert looks[2].workers[0].shares["compute"] == pytest.approx(2 / 3, abs=0.01)
    assert looks[-1].workers[0].shares["compute"] == 0.0


def test_an_epoch_is_as_far_as_its_rounds() -> None:
    assert look(document()).epoch_progress == 0.3  # 12 of 40
    plan = msgspec.to_builtins(document().plan) | {"kind": "loader", "end_round": 0}
    assert look(document(plan=plan)).epoch_progress is None


def test_what_servers_hold_is_counted() -> None:
    shards = [
        {"shard": 0, "server": "server-0", "first_block": 0, "blocks": 3, "backups": ["server-1"]},
        {"shard": 1, "server": "server-1", "first_block": 3, "blocks": 2, "joining": ["server-0"]},
    ]
    table = msgspec.to_builtins(document().tables[0]) | {"shards": shards}
    found = look(document(member("server-0"), member("server-1"), tables=[table]))
    counts = [(one.primaries, one.backups, one.joining, one.blocks) for one in found.servers]
    assert counts == [(1, 0, 1, 5), (1, 1, 0, 5)]
    assert found.tables[0].joining == 1


# ---- what is shown -------------------------------------------------------------------------------


def test_everything_is_shown_where_there_is_room() -> None:
    lens = Lens(ADDRESS)
    others = [member("server-0", waiting="round 12 of slot 3"), member("worker-7", state="dead")]
    more = {"checkpoint": CHECKPOINT, "events": events(1, 2)}
    lens.look(0, 0.0, document(busy(0.0), *others, **more))
    found = lens.look(SECOND, 1.0, document(busy(0.5, samples=500), *others, **more))
    shown = "\n".join(text(found, 40))
    for words in (
        f"treefold at {ADDRESS}: running, view 5, round 12 of 40",
        "500 samples/s",
        "dead: worker-7",
        "epoch 1 ██████░░░░░░░░░░░░░░ 30 %",
        "checkpoint of version 10 in kept",
        "worker-0",
        "0-1 3",
        "█" * (BAR_CELLS // 2) + "·" * (BAR_CELLS // 4),
        "round 12 of slot 3",
        "model  sync",
        "event 1 came",
    ):
        assert words in shown
    assert text(found)[-1].endswith("event 2 came"), "the newest event is at the bottom"


def test_columns_are_below_each_other() -> None:
    lines = text(look(cluster(11)))
    begin = next(n for n, line in enumerate(lines) if line.startswith("worker "))
    ends = {lines[begin + n].index(f"slot {n - 1}") for n in (1, 5, 11)}
    assert ends == {lines[begin].index("waits for")}


@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 13, 24, 60, 300])
def test_a_look_fits_any_height(height: int) -> None:
    assert len(text(look(cluster(200, 8, 5)), height)) <= height


def test_what_is_left_out_is_said_with_how_much_it_is() -> None:
    lines = text(look(cluster(200, 8, 5)), 30)
    cut = [line for line in lines if line.startswith("...")]
    kinds = ("workers", "servers", "tables", "events")
    names = [next(kind for kind in kinds if kind in line) for line in cut]
    assert names == ["workers", "servers", "tables", "events"]
    shown = sum(line.startswith("worker-") for line in lines)
    assert f"... {200 - shown} more workers: rounds 12 to 12" in cut[0]
    assert f"{200 - shown} wait" in cut[0]
    assert lines[-1].endswith("event 40 came")


def test_lines_are_shared_out_by_weight_and_nobody_gets_more_than_it_wants() -> None:
    assert shared_out(100, [3, 5], [1, 1]) == [3, 5]
    assert shared_out(12, [100, 100], [2, 1]) == [8, 4]
    assert shared_out(12, [100, 2], [1, 1]) == [10, 2]
    assert shared_out(-3, [1], [1]) == [0]


def test_a_narrow_terminal_cuts_lines_and_wraps_none() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen._console = Console(file=out, width=50, height=20, force_terminal=True)  # its size
    screen._look = look(cluster(50))  # as shown at last
    screen.__exit__()
    lines = Console(file=io.StringIO()).render_str(out.getvalue()).plain.splitlines()
    assert len(lines) <= 20
    assert all(cell_len(line) <= 50 for line in lines if "\x1b" not in line)


def test_a_file_gets_every_line() -> None:
    out = io.StringIO()
    Tables(out).show(look(cluster(200)))
    assert "worker-199" in out.getvalue()


# ---- json ----------------------------------------------------------------------------------------


def test_a_line_of_json_has_rates_and_the_events_since_the_one_before() -> None:
    out, lens = io.StringIO(), Lens(ADDRESS)
    lines = Lines(out)
    for n, numbers in enumerate([(1, 2), (1, 2), (2, 3, 4)]):
        status = document(busy(float(n), samples=100 * n), events=events(*numbers))
        lines.show(lens.look(n * 2 * SECOND, 7.5, status))
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [[e["number"] for e in one["events"]] for one in found] == [[1, 2], [], [3, 4]]
    assert found[2]["samples_per_second"] == 50.0
    assert found[2]["workers"][0]["shares"]["compute"] == 0.5
    assert found[2]["at"] == 7.5
    assert msgspec.json.decode(out.getvalue().splitlines()[0], type=Look).view == 5


def test_another_scheduler_tells_all_its_events() -> None:
    out = io.StringIO()
    lines = Lines(out)
    lines.show(look(document(events=events(7, 8))))
    anew = [{"number": 8, "at": 99.0, "text": "the scheduler began anew"}]
    lines.show(look(document(events=anew)))
    assert json.loads(out.getvalue().splitlines()[1])["events"] == anew


# ---- watching ------------------------------------------------------------------------------------


class Kept:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    def show(self, look: Look) -> None:
        """Keep it."""
        self.looks.append(look)


class FakeLink:
    """Answers what it is told to, None for nothing; time passes with each question."""

    def __init__(self, answers: list[Status | None]) -> None:
        self.answers = iter(answers)
        self.now_ns = 0
        self.is_watching = False

    def ask(self, now_ns: int, *, is_watching: bool = False) -> None:
        """Somebody asks."""
        assert now_ns == self.now_ns
        self.is_watching = is_watching

    def body(self, timeout_ms: int = 0) -> tuple[int, bytes] | None:
        """The next answer, at once, or none in time."""
        answer = next(self.answers, None)
        if answer is None:
            self.now_ns += timeout_ms * 1_000_000
            return None
        return self.now_ns, msgspec.json.encode(answer)


@pytest.fixture
def kept() -> Kept:
    """A view."""
    return Kept()


def watched(
    monkeypatch: pytest.MonkeyPatch,
    kept: Kept,
    answers: list[Status | None],
    count: int | None = None,
) -> int:
    """Watch until it ends by itself; every second passes at once."""
    link = FakeLink(answers)
    monkeypatch.setattr("time.monotonic_ns", lambda: link.now_ns)
    monkeypatch.setattr("time.sleep", lambda s: setattr(link, "now_ns", link.now_ns + int(s * 1e9)))
    code = Watch(ADDRESS, link, kept, count).run(is_warm=False)  # type: ignore[arg-type]  # as a link
    assert link.is_watching
    return code


@pytest.mark.parametrize(
    ("outcome", "code"), [("done", 0), ("drained", 0), ("failed", 1), ("not_formed", 3)]
)
def test_the_exit_code_says_how_the_job_ended(
    monkeypatch: pytest.MonkeyPatch, kept: Kept, outcome: str, code: int
) -> None:
    ended = document(phase="ended", ending={"outcome": outcome, "text": "why"})
    assert watched(monkeypatch, kept, [document(), document(), ended]) == code
    assert text(kept.looks[-1])[-1] != ""
    assert f"{outcome}: why" in "\n".join(text(kept.looks[-1]))


def test_so_many_are_shown_as_asked_for_and_the_first_has_rates(
    monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    answers: list[Status | None] = [document(busy(0.5 * n, samples=100 * n)) for n in range(9)]
    assert watched(monkeypatch, kept, answers, count=2) == 0
    assert [one.samples_per_second for one in kept.looks] == [100.0, 100.0]


def test_a_scheduler_that_does_not_answer_is_asked_again_and_what_is_old_is_said_so(
    monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    answers = [document(), None, None, document(view=6)]
    watched(monkeypatch, kept, answers, count=3)
    assert [one.silent_s for one in kept.looks] == [2.0, 3.0, 0.0]
    assert "no answer for 2 s: still trying" in "\n".join(text(kept.looks[0]))
    assert [one.view for one in kept.looks] == [5, 5, 6]


def test_a_scheduler_that_is_gone_is_given_up_and_the_last_round_named(
    monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    with pytest.raises(UnavailableError, match="within 60 s; the last that it said was round 12"):
        watched(monkeypatch, kept, [document()])
    assert len(kept.looks) == GONE_NS // EVERY_NS - 2


def test_nobody_there_at_first_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    with pytest.raises(UnavailableError, match=f"no scheduler answered at {ADDRESS} within 4 s"):
        watched(monkeypatch, kept, [])


def test_a_count_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        top.main(["--scheduler", ADDRESS, "--count", "0"])
    assert "--count takes 1 or more" in capsys.readouterr().err
