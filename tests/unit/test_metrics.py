"""Metrics: names that agree with the page, a format that Prometheus reads, and who may ask."""

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.promtool import SHIPPED, names_in, promtool, queries, syntax_faults
from treefold.common.config import Settings, metrics_port_of
from treefold.common.errors import ConfigError, UnavailableError
from treefold.common.metrics import (
    BY_NAME,
    METRICS,
    PREFIX,
    Counts,
    Durations,
    Kind,
    Metric,
    Reading,
    staleness,
)
from treefold.transport import questions
from treefold.transport.endpoint import Endpoint, exposition
from treefold.transport.tally import Tally, op_of
from treefold.transport.watch import Watch, watch_for
from treefold.transport.web import is_loopback
from treefold.wire.exchange import Received, Send
from treefold.wire.messages import Push, Refused, RoundMeta, StatusRequest
from treefold.wire.words import Code, Role

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| `treefold_(\w+)` \| (\w+) \| (\w*) ?\| ((?:`\w+`(?:, )?)*) ?\| (.+) \|$", re.MULTILINE
)
SECTIONS = {
    "Of every process": ("scheduler", "server", "worker"),
    "Of servers and workers": ("server", "worker"),
    "Of the scheduler": ("scheduler",),
    "Of servers": ("server",),
    "Of workers": ("worker",),
}
WORD = "sixteen-letters-and-more"


def unit_of(name: str) -> str:
    """The base unit in a name, empty if it counts things."""
    return next((unit for unit in ("seconds", "bytes") if unit in name.split("_")), "")


def described(page: str) -> list[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]]:
    """Name, type, unit, labels and roles of each row of the page."""
    found = []
    for heading, roles in SECTIONS.items():
        [body] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        for name, kind, unit, labels, _ in ROW.findall(body):
            found.append((name, kind, unit, tuple(re.findall(r"`(\w+)`", labels)), roles))
    return found


def declared() -> list[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]]:
    """The same of the code."""
    return [(m.name, m.kind.value, unit_of(m.name), m.labels, m.roles) for m in METRICS]


def a_reading(metric: Metric, role: str) -> Reading:
    """Some value of a metric."""
    value = Durations().counts() if metric.kind is Kind.HISTOGRAM else 1.0
    labels = ("1", role, "0") if metric.name == "build_info" else metric.labels
    return Reading(metric.name, value, labels)


def page_of(role: str) -> str:
    """What a process of a role that has a value of everything answers."""
    readings = [a_reading(metric, role) for metric in METRICS if role in metric.roles]
    return exposition(readings, "")[0].decode()


def no_bell() -> None:
    """Nobody is woken."""


# ---- names ---------------------------------------------------------------------------------------


def test_the_page_and_the_code_have_the_same_names_types_units_labels_and_roles() -> None:
    assert sorted(described(PAGE)) == sorted(declared())


def test_no_label_tells_parameters_apart() -> None:
    labels = {label for metric in METRICS for label in metric.labels}
    assert labels == {
        "version", "role", "rank", "op", "status", "way", "queue", "activity", "state", "worker",
        "member", "part", "table", "shard", "kind", "reason",
    }  # fmt: skip


def test_a_metric_that_one_of_them_lacks_would_be_noticed() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| `treefold_slots`"))
    assert sorted(described(PAGE.replace(row, ""))) != sorted(declared())
    assert sorted(described(PAGE.replace(row, row.replace("gauge", "counter")))) != sorted(
        declared()
    )
    assert sorted(described(PAGE.replace(row, row.replace("`worker`", "`who`")))) != sorted(
        declared()
    )


@pytest.mark.parametrize("role", ["scheduler", "server", "worker"])
def test_promtool_finds_nothing_to_say_about_the_names(role: str) -> None:
    checked = promtool("check", "metrics", text=page_of(role))
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_promtool_would_complain_of_a_unit_that_is_none() -> None:
    bad = "# HELP treefold_push_latency_ms Time.\n# TYPE treefold_push_latency_ms gauge\n"
    assert promtool("check", "metrics", text=bad + "treefold_push_latency_ms 1\n").returncode != 0


# ---- values --------------------------------------------------------------------------------------


def test_a_reading_is_exposed_with_its_labels_and_a_histogram_adds_up() -> None:
    readings = [
        Reading("build_info", 1, ("0.1", "server", "2")),
        Reading("requests_total", 7, ("push", "ok")),
        Reading("staleness_steps", staleness([4, 2, 1], 5), ("model", "worker-1")),
    ]
    text = exposition(readings, "")[0].decode()
    assert 'treefold_build_info{rank="2",role="server",version="0.1"} 1.0' in text
    assert 'treefold_requests_total{op="push",status="ok"} 7.0' in text
    rows = re.findall(
        r'^treefold_staleness_steps_bucket{le="([\d.+Inf]+)".*} (\S+)$', text, re.MULTILINE
    )
    assert rows[:3] == [("0.0", "4.0"), ("1.0", "6.0"), ("3.0", "7.0")]
    assert rows[-1] == ("+Inf", "7.0")
    assert 'treefold_staleness_steps_sum{table="model",worker="worker-1"} 5.0' in text
    assert "# TYPE treefold_shards gauge" in text
    assert "treefold_worker_step" not in text


def test_contributions_staler_than_all_bounds_are_in_the_open_class() -> None:
    counts = staleness([0] * 32 + [3], 3 << 32)
    assert counts.counts[-1] == 3
    assert sum(counts.counts) == 3


def test_durations_fall_into_the_class_of_the_next_bound() -> None:
    durations = Durations()
    for ns in (30_000, 30_001, 5_000_000_000):
        durations.add(ns)
    found = durations.counts()
    assert (found.counts[0], found.counts[1], found.counts[-1]) == (1, 1, 1)
    assert found.sum == pytest.approx(5.000060001)


def test_a_tally_tells_messages_that_were_refused_from_those_that_were_not() -> None:
    tally = Tally({})
    asked = Received(b"peer", StatusRequest(7))
    tally.see(asked, [], 0, 1_000)
    tally.see(asked, [Send(b"peer", Refused(0, Code.BAD_MESSAGE, "no"))], 0, 1_000)
    tally.malformed += 1
    found = {one.labels: one.value for one in tally.readings() if one.name == "requests_total"}
    assert found[("status_request", "ok")] == 1
    assert found[("status_request", "refused")] == 1
    assert found[("unknown", "malformed")] == 1


def test_a_kind_of_message_is_named_in_small_letters() -> None:
    assert [op_of(Push), op_of(RoundMeta)] == ["push", "round_meta"]


# ---- the endpoint --------------------------------------------------------------------------------


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    """An endpoint that wants a token."""
    file = tmp_path / "token"
    file.write_text(WORD + "\n")
    settings = Settings(metrics_port=0, metrics_token_file=str(file))
    made = Endpoint(
        settings,
        lambda: [Reading("build_info", 1, ("0", "worker", "0"))],
        lambda: [("here:1", "scheduler")],
    )
    yield made
    made.close()


def get(address: str, page: str, **headers: str) -> tuple[int, str]:
    """Ask for a page; its status and its text."""
    request = urllib.request.Request(f"http://{address}{page}", headers=headers)  # http
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 # as above
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_who_has_the_token_gets_the_pages_and_nobody_else_does(endpoint: Endpoint) -> None:
    bearer = {"Authorization": f"Bearer {WORD}"}
    status, text = get(endpoint.address, "/metrics", **bearer)
    assert (status, "treefold_build_info" in text) == (200, True)
    assert json.loads(get(endpoint.address, "/targets", **bearer)[1]) == [
        {"targets": ["here:1"], "labels": {"instance": "scheduler"}}
    ]
    assert get(endpoint.address, "/elsewhere", **bearer)[0] == 404
    assert get(endpoint.address, "/metrics")[0] == 401
    assert get(endpoint.address, "/metrics", Authorization=f"Bearer {WORD}x")[0] == 401
    assert get(endpoint.address, "/metrics", Authorization=WORD)[0] == 401


def test_who_asks_for_openmetrics_gets_it(endpoint: Endpoint) -> None:
    bearer = {"Authorization": f"Bearer {WORD}", "Accept": "application/openmetrics-text"}
    assert get(endpoint.address, "/metrics", **bearer)[1].endswith("# EOF\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "node-7"])  # noqa: S104 # refused
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="metrics_token_file"):
        watch_for(Settings(metrics_port=0, metrics_bind=host), Role.SERVER, Tally({}), no_bell)
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_an_address_of_this_machine_alone_needs_none(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("text", [None, "short", "größer als erlaubt"])
def test_a_token_that_protects_nothing_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    settings = Settings(metrics_port=0, metrics_token_file=str(file))
    with pytest.raises(ConfigError, match="token"):
        watch_for(settings, Role.SERVER, Tally({}), no_bell)


def test_a_port_that_is_taken_is_said_to_be(endpoint: Endpoint) -> None:
    port = int(endpoint.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port}"):
        watch_for(Settings(metrics_port=port), Role.SERVER, Tally({}), no_bell)


# ---- the watch -----------------------------------------------------------------------------------


def test_nothing_looks_on_unless_it_is_asked_for() -> None:
    assert watch_for(Settings(), Role.SERVER, Tally({}), no_bell) is None


def test_a_question_is_answered_by_the_thread_that_owns_the_sockets() -> None:
    rung = threading.Event()
    watch = Watch(Role.SERVER, Tally({}), rung.set)
    answers: list[list[Reading]] = []
    asking = threading.Thread(target=lambda: answers.append(watch.ask()))
    asking.start()
    assert rung.wait(10)
    assert answers == []
    watch.turn()
    asking.join(10)
    assert answers[0][0].name == "build_info"


def test_a_process_that_is_busy_for_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "ANSWER_MAX_S", 0.01)
    with pytest.raises(UnavailableError, match="busy"):
        Watch(Role.SERVER, Tally({}), no_bell).ask()


def test_a_fault_in_the_readings_reaches_who_asks_and_not_the_process() -> None:
    class Broken(Tally):
        def readings(self) -> Iterator[Reading]:
            raise ZeroDivisionError

    made: list[Watch] = []

    def ring() -> None:
        made[0].turn()

    made.append(Watch(Role.SERVER, Broken({}), ring))
    with pytest.raises(ZeroDivisionError):
        made[0].ask()


def test_processes_that_start_together_get_ports_of_their_own() -> None:
    settings = Settings(servers=2, workers=2, metrics_port=9100)
    names = [("scheduler", 0), ("server", 0), ("server", 1), ("worker", 0), ("worker", 1)]
    assert [metrics_port_of(settings, *name) for name in names] == [9100, 9101, 9102, 9103, 9104]
    free = msgspec.structs.replace(settings, metrics_port=0)
    assert {metrics_port_of(free, *name) for name in names} == {0}


# ---- what is shipped -----------------------------------------------------------------------------


def unknown_names(wanted: list[str]) -> list[str]:
    """Metrics that queries name and nobody has."""
    found = [name for query in wanted for name in names_in(query)]
    ours = [name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)]
    return [name for name in ours if name not in BY_NAME]


def test_the_dashboard_asks_for_what_there_is_in_queries_that_promtool_reads(
    tmp_path: Path,
) -> None:
    wanted = queries((SHIPPED / "dashboard.json").read_text(encoding="utf-8"))
    assert len(wanted) > 20
    assert unknown_names(wanted) == []
    assert syntax_faults(wanted, tmp_path) == ""


def test_a_wrong_name_and_a_wrong_query_would_be_noticed(tmp_path: Path) -> None:
    assert unknown_names(["rate(treefold_rounds_total[1m])"]) == ["rounds_total"]
    assert "parse error" in syntax_faults(["rate(treefold_slots[1m]"], tmp_path)


def test_the_alerts_name_what_there_is_and_fire_when_they_should(tmp_path: Path) -> None:
    rules = SHIPPED / "alerts.yml"
    assert unknown_names([rules.read_text(encoding="utf-8")]) == []
    checked = promtool("check", "rules", str(rules))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "2 rules found" in checked.stdout
    text = Path(__file__).parents[1].joinpath("support", "alerts_test.yml").read_text("utf-8")
    file = tmp_path / "test.yml"
    file.write_text(text.replace("RULES", str(rules)))
    tested = promtool("test", "rules", str(file))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_an_alert_with_another_bound_would_be_noticed(tmp_path: Path) -> None:
    rules = tmp_path / "alerts.yml"
    shipped = (SHIPPED / "alerts.yml").read_text(encoding="utf-8")
    rules.write_text(shipped.replace("> 100", "> 1000"))
    text = Path(__file__).parents[1].joinpath("support", "alerts_test.yml").read_text("utf-8")
    file = tmp_path / "test.yml"
    file.write_text(text.replace("RULES", str(rules)))
    assert promtool("test", "rules", str(file)).returncode != 0


def test_the_configuration_of_prometheus_is_one() -> None:
    checked = promtool("check", "config", str(SHIPPED / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_counts_have_a_class_beyond_their_bounds() -> None:
    counts: Counts = staleness([], 0)
    assert len(counts.counts) == len(counts.bounds) + 1
