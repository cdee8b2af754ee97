"""The live page without a browser: lanes and curves, who may ask for what, and what scripts say."""

import itertools
import json
import math
import re
import threading
import urllib.error
import urllib.request
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
import torch

from tests.support.synthetic import LOOKING, TOKEN, Synthetic, served
from tests.unit.scheduler_driver import WORKERS, Driver
from treefold.common.config import Settings
from treefold.common.errors import CapacityError, ConfigError, DataError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import (
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.scheduler import feed as feeds
from treefold.scheduler import live
from treefold.scheduler.feed import Feed
from treefold.scheduler.history import LOSS, POINTS_MAX, ROUNDS, SAMPLES, History, Series
from treefold.scheduler.lanes import FILLED_MAX, OLDER_MAX, RECENT, Lanes
from treefold.scheduler.pages import FILES, file
from treefold.scheduler.tensors import tensors_of
from treefold.server.digest import checksum
from treefold.server.shard import FoldedPart, ShardState
from treefold.server.statistics import EVERY_NS, PATIENCE_NS, Statistics, joined, sums_of
from treefold.torch.embedded import connect_embedded
from treefold.torch.progress import Progress, as_number
from treefold.wire.membership import Identity, Membership, Standing
from treefold.wire.messages import DeclareTable, Heartbeat, HeartbeatSeen
from treefold.wire.words import LOGGED_MAX, LOGGED_NAME_MAX, Figure, Member, Outcome, Role

S = 1_000_000_000
UNIX = 1_790_000_000.0


# ---- lanes ---------------------------------------------------------------------------------------


class Lane:
    """One worker, whose time is told second by second."""

    def __init__(self) -> None:
        self.lanes = Lanes()
        self.spent = {"compute": 70 * S, "wait": 5 * S}
        self.second(is_waiting=False)

    def second(self, *, is_waiting: bool, **spent_s: float) -> None:
        """A second goes by."""
        for name, more in spent_s.items():
            self.spent[name] = self.spent.get(name, 0) + int(more * S)
        self.lanes.begin(float(len(self.lanes.recent_at)))
        lane = self.lanes.see("worker-0", Role.WORKER, 1)
        lane.add(S, self.spent, is_waiting=is_waiting)

    @property
    def cells(self) -> list[list[int] | None]:
        """What is shown: compute, push, pull, wait in percent."""
        return self.lanes.by_name["worker-0"].recent


def test_a_cell_has_the_shares_of_a_second_and_the_rest_is_idle() -> None:
    lane = Lane()
    lane.second(is_waiting=False, compute=0.5, push=0.1, pull=0.04, wait=0.2, **{"await": 0.01})
    assert lane.cells == [[0, 0, 0, 0], [50, 10, 5, 20]]


def test_what_took_longer_than_a_second_fills_up_what_was_idle_before() -> None:
    lane = Lane()
    for _ in range(3):
        lane.second(is_waiting=False, push=0.2)
    lane.second(is_waiting=False, compute=2.5)
    assert lane.cells[-3:] == [[70, 20, 0, 0], [80, 20, 0, 0], [100, 0, 0, 0]]
    for _ in range(FILLED_MAX + 5):
        lane.second(is_waiting=False)
    lane.second(is_waiting=False, compute=1_000)
    full = [cell for cell in lane.cells[4:] if cell and cell[0] == 100]
    assert len(full) == FILLED_MAX + 1  # the one of before, and no more than a report can fill


def test_who_waits_is_shown_before_it_is_over_and_not_twice() -> None:
    lane = Lane()
    lane.second(is_waiting=True, compute=0.3)
    lane.second(is_waiting=True)
    assert lane.cells[-2:] == [[30, 0, 0, 70], [0, 0, 0, 100]]
    lane.second(is_waiting=False, wait=1.9, compute=0.5)
    assert lane.cells[-3:] == [[30, 0, 0, 70], [0, 0, 0, 100], [50, 0, 0, 20]]


def test_a_second_without_a_member_has_no_cell_and_its_successor_goes_on_with_the_lane() -> None:
    lane = Lane()
    lane.second(is_waiting=False, compute=0.6)
    lane.lanes.begin(2.0)
    lane.lanes.begin(3.0)
    lane.lanes.see("worker-0", Role.WORKER, 2).add(S, {"compute": 9 * S}, is_waiting=False)
    assert lane.cells == [[0, 0, 0, 0], [60, 0, 0, 0], None, [0, 0, 0, 0]]


def test_older_columns_are_merged_and_their_number_is_bounded() -> None:
    lane = Lane()
    found, known = lane.lanes, lane.lanes.by_name["worker-0"]
    for number in range(5 * (RECENT + OLDER_MAX)):
        lane.second(is_waiting=False, compute=(number % 2) * 0.8)
        assert len(known.older) == len(found.older_at) <= OLDER_MAX + 1
        assert len(known.recent) == len(found.recent_at) <= RECENT
    assert found.older_at == sorted(found.older_at)
    merged = [cell[0] for cell in known.older[1:-1] if cell]
    assert set(merged) <= set(range(35, 46))  # the mean of 0 and 80, rounded some times


# ---- curves --------------------------------------------------------------------------------------


def test_a_curve_is_bounded_and_keeps_its_beginning_and_its_end() -> None:
    series = Series()
    for number in range(10 * POINTS_MAX):
        series.add((float(number), number, 1.0))
    times = [point[0] for point in series.points]
    assert len(times) <= POINTS_MAX + 1
    assert times[0] == 0
    assert times[-1] > 10 * POINTS_MAX - 32
    steps = {later - earlier for earlier, later in itertools.pairwise(times)}
    assert len(steps) == 1


def test_a_history_has_speeds_the_loss_and_what_scripts_say_of_the_newest_round() -> None:
    driver, history = Driver(), History()
    driver.train()
    workers = [state.member.incarnation for state in driver.core.roster.live(Role.WORKER)]
    for second, samples in enumerate((0, 500)):
        for number, who in enumerate(workers):
            beat = Heartbeat(who, 0, 0, 7, 0, samples, 2.0, "", 0, 0.0)
            logged = [("accuracy", 7 + second, 0.25 + 0.5 * number)]
            driver.say(WORKERS[number], msgspec.structs.replace(beat, logged=logged))
        history.sample(second * S, UNIX + second, driver.core)
    assert history.newest[SAMPLES] == (UNIX + 1, 7, 1000.0)
    assert history.newest[LOSS] == (UNIX + 1, 7, 2.0)
    assert history.newest["accuracy"] == (UNIX + 1, 8, 0.5)
    assert history.newest[ROUNDS][:2] == (UNIX + 1, 7)
    document = msgspec.json.decode(msgspec.json.encode(history.document()))
    assert document["series"]["accuracy"] == [[UNIX + 1, 8, 0.5]]
    assert sorted(document["lanes"]) == ["server-0", "worker-0", "worker-1"]
    history.sample(2 * S, UNIX + 2, driver.core)
    assert len(history.series["accuracy"].points) == 1  # nothing new was said


# ---- the server ----------------------------------------------------------------------------------


def ask(link: str, path: str, token: str = "", method: str = "GET") -> tuple[int, str]:
    """Ask the server of a page; its status and its text."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = link.partition("#")[0].rstrip("/") + path
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310 # http
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 # as above
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_files_are_for_everybody_and_load_nothing_from_elsewhere() -> None:
    with served(Synthetic(1, 1)) as (link, _):
        for name in ("", *FILES):
            status, text = ask(link, f"/{name}")
            assert (status, text) == (200, file(name or "index.html").decode())
        url = link.partition("#")[0]
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 # http
            policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert ask(link, "/../pages.py")[0] == 404


@pytest.mark.parametrize("path", ["/feed", "/report", "/drain/worker-0"])
def test_what_is_about_the_job_needs_the_token(path: str) -> None:
    drained: list[str] = []
    method = "POST" if path.startswith("/drain") else "GET"
    with served(Synthetic(1, 1), drained) as (link, _):
        assert ask(link, path, method=method)[0] == 401
        assert ask(link, path, "not-the-right-token", method)[0] == 401
        assert ask(link, f"{path}?token={TOKEN}", method=method)[0] == 401
    assert drained == []


def test_who_may_only_look_can_drain_nobody() -> None:
    drained: list[str] = []
    with served(Synthetic(1, 1), drained) as (link, _):
        assert ask(link, "/report", LOOKING)[0] == 200
        assert ask(link, "/drain/worker-0", LOOKING, "POST") == (403, "this token may only look\n")
        assert ask(link, "/drain/worker-0", TOKEN)[0] == 404  # nothing is done by looking
        assert drained == []
        assert json.loads(ask(link, "/drain/worker-0", TOKEN, "POST")[1])["refusal"] == ""
        status, text = ask(link, "/drain/worker-9", TOKEN, "POST")
        assert (status, json.loads(text)["refusal"]) == (409, "there is no 'worker-9'")
    assert drained == ["worker-0", "worker-9"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 401), ("localhost", 401), ("[::1]:80", 401), ("evil.example", 421), ("", 421)],
)
def test_a_request_for_another_host_is_not_answered(host: str, status: int) -> None:
    with served(Synthetic(1, 1)) as (link, _):
        connection = HTTPConnection(urlsplit(link).netloc, timeout=10)
        connection.request("GET", "/feed", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()


def test_no_more_pages_than_allowed_are_served_and_a_place_gets_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "VIEWERS_MAX", 1)
    with served(Synthetic(1, 1)) as (link, feed):
        url = link.partition("#")[0] + "feed"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 # http
        with urllib.request.urlopen(request, timeout=10) as stream:  # noqa: S310 # http
            assert stream.readline() == b"event: rights\n"
            assert ask(link, "/feed", TOKEN)[0] == 503
        gone = threading.Event()
        while feed.is_watched and not gone.wait(0.01):
            feed.publish(b"{}")  # the server sees that nobody reads
        with urllib.request.urlopen(request, timeout=10) as stream:  # noqa: S310 # as above
            assert stream.readline() == b"event: rights\n"


def test_one_encoding_reaches_every_page_and_who_is_slow_gets_the_newest() -> None:
    feed = Feed()
    one, other = feed.documents(5.0), feed.documents(5.0)
    body = b'{"at": 1}'
    threading.Timer(0.05, feed.publish, [body]).start()
    assert next(one) is body
    feed.publish(b"2")
    feed.publish(b"3")
    assert next(one) == b"3"
    feed.end(0.0)
    assert list(one) == []
    assert list(other) == []
    assert next(Feed().documents(0.0)) == b""


def no_bell() -> None:
    """Nobody is woken."""


# ---- settings ------------------------------------------------------------------------------------


def test_a_page_that_other_machines_can_reach_needs_a_token_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a file with a token in page_token_file"):
        live.token_of(Settings(page_bind="0.0.0.0"))  # noqa: S104 # is refused
    file_ = tmp_path / "token"
    file_.write_text(f"{TOKEN}\n")
    everywhere = Settings(page_bind="0.0.0.0", page_token_file=str(file_))  # noqa: S104 # as above
    assert live.token_of(everywhere) == TOKEN
    assert len({live.token_of(Settings()) for _ in range(3)}) == 3
    file_.write_text("short")
    with pytest.raises(ConfigError, match="16 are the least"):
        live.token_of(everywhere)


def test_a_script_that_is_alone_says_where_its_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    client = connect_embedded(Settings(page_port=0, report=str(report)))
    client.join()
    [link] = re.findall(
        r"treefold: live page (http://127\.0\.0\.1:\d+/#\S+)", capsys.readouterr().err
    )
    status, page = ask(link, "/report", link.partition("#")[2])
    assert (status, '"phase":"running"' in page) == (200, True)
    client.leave(Outcome.DONE, "")
    assert '"outcome":"done"' in report.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="no folder for the report"):
        live.Live(Settings(report=str(tmp_path / "no" / "x.html")), Driver().core, no_bell, str)


# ---- what scripts say ----------------------------------------------------------------------------


def test_of_each_name_the_newest_value_is_told_once() -> None:
    progress = Progress()
    for round_ in range(3):
        progress.log("accuracy", round_, round_ / 2)
    progress.log("nothing", 3, float("nan"))
    assert progress.take_logged() == [("accuracy", 2, 1.0)]
    assert progress.take_logged() == []


def test_too_many_names_and_names_too_long_are_refused_by_name() -> None:
    progress = Progress()
    for number in range(LOGGED_MAX):
        progress.log(f"n{number}", 0, 1.0)
    progress.log("n0", 1, 1.0)
    with pytest.raises(CapacityError, match=r"'one more'.* than the 32 "):
        progress.log("one more", 0, 1.0)
    for name in ("", "x" * (LOGGED_NAME_MAX + 1)):
        with pytest.raises(CapacityError, match="1 to 64"):
            progress.log(name, 0, 1.0)


@pytest.mark.parametrize("name", ["of \udcff.png", "a\x1b[2Jb", "two\nlines"])
def test_a_name_that_cannot_be_sent_or_shown_is_refused_before_it_ends_the_worker(
    name: str,
) -> None:
    progress = Progress()
    with pytest.raises(DataError, match="not printed"):
        progress.log(name, 0, 1.0)
    assert progress.take_logged() == []


@pytest.mark.parametrize(
    "value",
    [
        "much",
        None,
        torch.zeros(2),
        [1.0],
        torch.zeros(2).numpy(),
        pytest.param(10**400, id="huge"),
        torch.tensor(1j),
    ],
)
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"ps\.log\('x', \.\.\.\) was given"):
        as_number("x", value)


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor([2.0]), torch.tensor(2.0).numpy()[()]])
def test_numbers_of_all_kinds_can_be_said(value: object) -> None:
    assert as_number("x", value) == 2.0


# ---- statistics of tensors -----------------------------------------------------------------------


SHAPES = {"big": [300, 1_000], "small": [5], "mean": [7]}  # the first one lies in two parts


class Server:
    """What a server's statistics see: one shard, a clock and a heartbeat."""

    def __init__(self) -> None:
        tensors = [
            TensorSpec(name, shape, Dtype.FLOAT32, -1 if name == "mean" else 0)
            for name, shape in SHAPES.items()
        ]
        groups: list[Hyper] = [{"lr": 0.5}]
        sgd = OptimizerSpec("SGD", groups)
        spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, sgd)
        self.state = ShardState(spec, ShardSpan(0, Layout(spec).blocks))
        self.values = torch.randn(Layout(spec).elements, generator=torch.Generator().manual_seed(3))
        for part, (start, stop) in enumerate(self.state.parts):
            self.state.initialize(part, self.values[start:stop])
        identity = Identity(Role.SERVER, 1, "", "", 1, "0")
        self.membership = Membership(identity, standing=Standing.MEMBER, incarnation=1)
        self.rings: list[int] = []
        ring = lambda: self.rings.append(1)  # noqa: E731 # counts
        self.statistics = Statistics({(0, 0): self.state}, self.membership, ring)

    def watch(self, *, is_watched: bool) -> None:
        """The scheduler says whether anybody looks."""
        self.membership.on_heartbeat_seen(0, HeartbeatSeen(1, 1, 1, is_watched))

    def turn(self, now_ns: int, times: int = 10) -> list[Figure]:
        """Some turns; what the next heartbeat takes along."""
        for _ in range(times):
            self.statistics.turn(now_ns)
        return self.membership.heartbeat().figures

    def see(self, gradient: torch.Tensor, absent: bytes = b"") -> None:
        """A round's gradient is folded."""
        parts = enumerate(self.state.parts)
        folded = [FoldedPart(n, gradient[start:stop], absent) for n, (start, stop) in parts]
        self.statistics.see((0, 0), folded)


def test_weights_and_gradients_have_the_statistics_that_torch_says_they_have() -> None:
    server = Server()
    server.watch(is_watched=True)
    assert server.turn(0, times=1) == []
    gradient = server.values * 3 - 1
    server.see(gradient)
    server.see(gradient * 100)  # only the next one counts
    core = Driver().core
    core.declared.table("worker-0", DeclareTable(2, 1, server.state.spec))
    core.declared.place(1, [1], [2], 1)
    core.roster.enroll(Member(Role.SERVER, 0, 0, "a", "h", 1), b"s", 1, 0).figures = server.turn(1)
    rows = {str(row["name"]): row for row in tensors_of(core)}
    assert list(rows) == list(SHAPES)
    for kind, flat in (("weights", server.values), ("gradient", gradient)):
        for name, one in zip(SHAPES, torch.split(flat.double(), [300_000, 5, 7]), strict=True):
            if (kind, name) == ("gradient", "mean"):
                assert kind not in rows[name]  # a buffer has none
                continue
            wanted = {
                "count": one.numel(), "mean": one.mean().item(), "min": one.min().item(),
                "std": one.std(correction=0).item(), "max": one.max().item(),
                "norm": one.norm().item(),
            }  # fmt: skip
            assert rows[name][kind] == pytest.approx(wanted, rel=1e-6)


def test_nothing_is_computed_while_nobody_looks_and_it_is_sent_once() -> None:
    server = Server()
    assert server.turn(0) == []
    assert server.rings == []
    server.watch(is_watched=True)
    server.turn(0, times=1)
    server.see(server.values)
    assert len(server.turn(1)) == 5  # three have weights, two of them a gradient
    assert len(server.rings) == len(server.state.parts)
    assert server.turn(2) == []
    server.watch(is_watched=False)
    assert server.turn(1 << 60) == []


def test_statistics_rest_between_passes_and_do_not_wait_for_gradients_for_ever() -> None:
    server = Server()
    server.watch(is_watched=True)
    assert server.turn(0) == []  # gradients are waited for
    assert [figure.kind for figure in server.turn(PATIENCE_NS)] == [0] * 3
    assert server.turn(PATIENCE_NS + EVERY_NS - 1) == []
    later = PATIENCE_NS + 1_000 * EVERY_NS
    server.turn(later)
    assert len(server.turn(later + PATIENCE_NS)) == 3


def test_a_tensor_without_a_gradient_has_none_and_what_is_not_finite_is_told_as_such() -> None:
    server = Server()
    server.watch(is_watched=True)
    server.turn(0, times=1)
    gradient = server.values.clone()
    gradient[7] = float("nan")
    server.see(gradient, absent=b"\x02")  # the second piece of a part: small
    kinds = [(one.tensor, one.kind) for one in server.turn(1)]
    assert (1, 1) not in kinds
    assert (0, 1) in kinds
    assert sums_of(gradient)[0] == gradient.numel()
    for one in joined(sums_of(gradient[:100]), sums_of(gradient[100:]))[1:]:
        assert math.isnan(one)


def test_nothing_that_is_looked_at_changes() -> None:
    server = Server()
    before = checksum(server.state)
    server.watch(is_watched=True)
    server.turn(0)
    gradient = server.values.clone()
    server.see(gradient)
    assert server.turn(1)
    assert checksum(server.state) == before
    assert torch.equal(gradient, server.values)
