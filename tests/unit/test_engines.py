"""What the environments of engines say, who is believed, and that it is said in one line."""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from treefold.cli import scheduler, server, worker
from treefold.common import engines
from treefold.common.config import Settings, load
from treefold.common.engines import SCRIPT, Found, first_node
from treefold.common.errors import ConfigError
from treefold.server import shell as server_shell
from treefold.torch import session

DMLC = {
    "DMLC_ROLE": "worker", "DMLC_PS_ROOT_URI": "10.0.0.1", "DMLC_PS_ROOT_PORT": "9091",
    "DMLC_NUM_SERVER": "2", "DMLC_NUM_WORKER": "4", "DMLC_WORKER_ID": "3",
}  # fmt: skip
TORCHRUN = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "RANK": "5", "WORLD_SIZE": "8"}
SLURM = {
    "SLURM_JOB_ID": "123012", "SLURM_JOB_NODELIST": "gpu[07-09],login", "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip
CLUSTER = {
    "ps": ["ps-0.job:2222", "ps-1.job:2223"],
    "chief": ["chief.job:2222"],
    "worker": ["worker-0.job:2222", "worker-1.job:2222"],
}
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "6",
    "TREEFOLD_SCHEDULER_SERVICE_HOST": "10.96.0.7", "TREEFOLD_SCHEDULER_SERVICE_PORT": "29800",
}  # fmt: skip


def tf_config(kind: str, index: int, **changes: list[str]) -> dict[str, str]:
    """The environment of a task of TensorFlow's."""
    task = {"type": kind, "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": CLUSTER | changes, "task": task})}


def values(found: Found | None) -> dict[str, object]:
    """What an engine says, without who says it."""
    assert found is not None
    return {key: value for key, (value, _) in found.values.items()}


# ---- one engine after the other ------------------------------------------------------------------


def test_dmlc_says_where_the_scheduler_is_and_how_many_there_are() -> None:
    counts = {"servers": "2", "workers": "4"}
    there = {"scheduler": "tcp://10.0.0.1:9091"}
    detect = engines.Dmlc().detect
    assert values(detect(DMLC, "worker")) == there | counts | {"rank": "3"}
    assert values(detect(DMLC, "server")) == there | counts | {"bind": "tcp://*:0"}
    everywhere = {"bind": "tcp://*:9091", "advertise": "tcp://10.0.0.1:9091"}
    assert values(detect(DMLC, "scheduler")) == everywhere | counts
    assert detect({"DMLC_ROLE": "worker"}, "worker") is None


def test_dmlc_on_one_machine_stays_on_loopback_and_knows_interfaces_and_hosts() -> None:
    detect = engines.Dmlc().detect
    near = DMLC | {"DMLC_PS_ROOT_URI": "127.0.0.1"}
    assert values(detect(near, "scheduler"))["bind"] == "tcp://127.0.0.1:9091"
    assert values(detect(near, "server"))["bind"] == "tcp://127.0.0.1:0"
    chosen = DMLC | {"DMLC_INTERFACE": "eth1", "DMLC_NODE_HOST": "fd00::7"}
    said = values(detect(chosen, "server"))
    assert (said["bind"], said["advertise"]) == ("tcp://eth1:0", "tcp://[fd00::7]:0")
    assert values(detect(chosen, "scheduler"))["bind"] == "tcp://eth1:9091"


def test_torchrun_gives_the_host_the_rank_and_the_size_but_not_the_port() -> None:
    detect = engines.Torchrun().detect
    expected = {"scheduler": "tcp://node-0:29700", "workers": 8, "rank": 5}
    assert values(detect(TORCHRUN, SCRIPT)) == expected
    assert values(detect(TORCHRUN, "scheduler"))["bind"] == "tcp://*:29700"
    assert detect({"MASTER_ADDR": "node-0"}, "worker") is None


def test_a_script_that_torchrun_started_once_is_alone() -> None:
    one = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}
    assert engines.Torchrun().detect(one, SCRIPT) is None
    assert values(engines.Torchrun().detect(one, "worker"))["workers"] == 1


def test_slurms_scheduler_is_on_the_first_node_at_a_port_of_the_job() -> None:
    detect = engines.Slurm().detect
    assert values(detect(SLURM, "worker")) == {"scheduler": "tcp://gpu07:29712"}
    everywhere = {"bind": "tcp://*:29712", "advertise": "tcp://gpu07:29712"}
    assert values(detect(SLURM, "scheduler")) == everywhere


def test_a_script_in_a_batch_file_is_alone_and_a_role_is_not() -> None:
    batch = {key: SLURM[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST")}
    assert engines.Slurm().detect(batch, SCRIPT) is None
    assert engines.Slurm().detect(batch, "server") is not None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],a", "gpu07"), ("a,gpu[1-2]", "a"),
        ("r[1-2]n[3,5]-ib", "r1n3-ib"), ("n[5]", "n5"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_list_is_found(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_list_of_nodes_with_an_open_bracket_is_refused() -> None:
    with pytest.raises(ConfigError, match="a bracket stays open"):
        first_node("n[1-2")


def test_tf_config_gives_tasks_their_addresses_and_ranks() -> None:
    detect = engines.TensorFlow().detect
    common = {"scheduler": "tcp://ps-0.job:29700", "servers": 2, "workers": 3}
    assert values(detect(tf_config("worker", 1), SCRIPT)) == common | {"rank": 2}
    assert values(detect(tf_config("chief", 0), SCRIPT)) == common | {"rank": 0}
    own = {"bind": "tcp://*:2223", "advertise": "tcp://ps-1.job:2223", "rank": 1}
    assert values(detect(tf_config("ps", 1), "server")) == common | own
    named = tf_config("worker", 0, scheduler=["front.job:4000"])
    assert values(detect(named, "worker"))["scheduler"] == "tcp://front.job:4000"


def test_tf_config_without_servers_or_for_an_evaluator_is_not_for_us() -> None:
    detect = engines.TensorFlow().detect
    assert detect(tf_config("worker", 0, ps=[]), SCRIPT) is None
    assert detect(tf_config("evaluator", 0), SCRIPT) is None
    assert detect({}, SCRIPT) is None


def test_an_indexed_job_gives_a_rank_and_a_service_the_scheduler() -> None:
    detect = engines.Kubernetes().detect
    expected = {"scheduler": "tcp://10.96.0.7:29800", "rank": 6}
    assert values(detect(KUBERNETES, "worker")) == expected
    assert values(detect({"JOB_COMPLETION_INDEX": "6"}, SCRIPT)) == {"rank": 6}
    assert detect({}, "worker") is None


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        (DMLC | {"DMLC_PS_ROOT_PORT": "http"}, "DMLC_PS_ROOT_PORT is 'http'"),
        (TORCHRUN | {"WORLD_SIZE": "all"}, "WORLD_SIZE is 'all'"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is ''"),
        ({"TF_CONFIG": "{"}, "TF_CONFIG cannot be understood"),
        ({"JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX is '-1'"),
    ],
)
def test_a_variable_that_cannot_be_understood_is_named(
    environ: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        engines.find(engines.AUTO, environ, "worker")


# ---- who is believed -----------------------------------------------------------------------------


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of this process, in which nothing is of an engine; changes do not stay."""
    variables = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    monkeypatch.setattr(os, "environ", variables)
    log = logging.getLogger("treefold")
    level = log.level
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    yield variables
    log.setLevel(level)


def test_an_argument_beats_our_variable_which_beats_an_engine(environ: dict[str, str]) -> None:
    environ |= TORCHRUN
    assert load({}, role="worker").settings.scheduler == "tcp://node-0:29700"
    environ["TREEFOLD_SCHEDULER"] = "tcp://ours:1"
    assert load({}, role="worker").settings.scheduler == "tcp://ours:1"
    assert load({"scheduler": "tcp://said:1"}, role="worker").settings.scheduler == "tcp://said:1"


def test_who_knows_its_scheduler_takes_nothing_but_a_rank_from_an_engine(
    environ: dict[str, str],
) -> None:
    environ |= TORCHRUN
    loaded = load({"scheduler": "tcp://said:1"}, role="worker")
    assert (loaded.settings.workers, loaded.settings.rank) == (1, 5)
    assert loaded.engine == "from the environment of torchrun: rank 5 (RANK)"


def test_who_knows_where_to_listen_is_told_nothing_of_addresses(environ: dict[str, str]) -> None:
    environ |= SLURM
    settings = load({"bind": "tcp://10.0.0.9:1"}, role="scheduler").settings
    assert (settings.bind, settings.advertise) == ("tcp://10.0.0.9:1", "")


def test_the_first_engine_is_asked_for_everything_and_named_with_its_variables(
    environ: dict[str, str],
) -> None:
    environ |= KUBERNETES | SLURM | DMLC
    loaded = load({}, role="worker")
    assert loaded.engine == (
        "from the environment of dmlc: scheduler tcp://10.0.0.1:9091 (DMLC_PS_ROOT_URI), servers 2 "
        "(DMLC_NUM_SERVER), workers 4 (DMLC_NUM_WORKER), rank 3 (DMLC_WORKER_ID)"
    )
    assert loaded.origins["scheduler"] == "DMLC_PS_ROOT_URI"
    assert loaded.settings.workers == 4


def test_an_engine_can_be_chosen_or_none(environ: dict[str, str]) -> None:
    environ |= KUBERNETES | SLURM | DMLC
    chosen = load({"engine": "slurm"}, role="worker").settings
    assert chosen.scheduler == "tcp://gpu07:29712"
    assert load({"engine": "none"}, role="worker").settings.scheduler == ""
    with pytest.raises(ConfigError, match="engine is 'torchrun', and its variables are not"):
        load({"engine": "torchrun"}, role="worker")
    with pytest.raises(ConfigError, match="engine is 'mesos'; it is one of auto, none, dmlc"):
        load({"engine": "mesos"}, role="worker")


def test_a_value_of_an_engine_that_is_out_of_range_is_told_with_its_variable(
    environ: dict[str, str],
) -> None:
    environ |= DMLC | {"DMLC_NUM_WORKER": "many"}
    with pytest.raises(ConfigError, match="workers from DMLC_NUM_WORKER"):
        load({}, role="worker")


def test_who_has_no_role_asks_no_engine(environ: dict[str, str]) -> None:
    environ |= DMLC
    assert load({}).settings.scheduler == ""


# ---- who asks ------------------------------------------------------------------------------------


class Caught(Exception):
    """Carries the settings that something would have run with."""


def catch(settings: Settings, *_: object) -> NoReturn:
    """Stands for what would run."""
    raise Caught(settings)


@pytest.mark.parametrize(
    ("command", "place", "name"),
    [(scheduler, scheduler, "serve"), (server, server_shell, "main")],
    ids=["scheduler", "server"],
)
def test_a_role_that_is_started_by_itself_asks_the_engine(
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    command: Any,  # a module
    place: object,
    name: str,
) -> None:
    environ |= DMLC
    monkeypatch.setattr(place, name, catch)
    with pytest.raises(Caught) as caught:
        command.main([])
    settings = caught.value.args[0]
    assert "tcp://10.0.0.1:9091" in (settings.scheduler, settings.advertise)
    assert settings.bind in ("tcp://*:0", "tcp://*:9091")


def test_a_worker_asks_the_engine_and_hands_on_what_it_said(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ |= TORCHRUN
    monkeypatch.setattr(worker, "fetch", lambda *_: b"")
    monkeypatch.setattr(os, "execvpe", lambda _, __, values: catch(values))
    with pytest.raises(Caught) as caught:
        worker.main(["--", "true"])
    handed = caught.value.args[0]
    assert handed["TREEFOLD_SCHEDULER"] == "tcp://node-0:29700"
    assert handed["TREEFOLD_RANK"] == "5"


def test_a_script_asks_the_engine_and_says_so(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ |= tf_config("worker", 1)
    monkeypatch.setattr(session, "_connect", catch)
    with pytest.raises(Caught) as caught:
        session.init()
    assert caught.value.args[0].scheduler == "tcp://ps-0.job:29700"
    assert capsys.readouterr().err.startswith("treefold: from the environment of tf-config: sched")


def test_a_script_is_refused_where_the_engine_wants_a_server(environ: dict[str, str]) -> None:
    environ |= DMLC | {"DMLC_ROLE": "server"}
    with pytest.raises(ConfigError, match="start `treefold server` here instead"):
        session.init()
