"""The rendered Compose file, for real: containers of this machine's own programs, in one engine.

One cluster goes through everything that may happen to containers, one step after the other: ten
rounds are let through after each. What it ends with are the bits of one process alone.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.conftest import NOT_RUN
from tests.integration.jobs.stepwise import STEP
from tests.support import engine as engines
from tests.support import netns
from tests.support.engine import Engine
from tests.support.processes import JOBS, Bits
from treefold.cli import keys, render
from treefold.common.config import Settings
from treefold.common.errors import UnavailableError
from treefold.launch.link import MemberStatus, Status, fetch, parse
from treefold.transport.access import access_of
from treefold.wire.permissions import CURIOUS

JOB = "stepwise.py"
IMAGE = "treefold-test"
ANSWER_MS = 2_000  # a scheduler that is there answers in milliseconds
LOOK_S = 0.2
PATIENCE_S = 90.0  # for one step; most take two seconds
ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "deploy/compose/compose.yaml",
    *sorted((ROOT / "tests/unit/golden").glob("compose-*.yaml")),
]

# Kills the role's own process, as the kernel does when memory is short: the engine sees it end.
SUICIDE = """
import os, pathlib
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    words = (folder / "cmdline").read_bytes().split(b"\\0")
    if b"scheduler" in words and int(folder.name) not in (1, os.getpid()):
        os.kill(int(folder.name), 9)
"""


@pytest.fixture(scope="module")
def engine(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A running engine."""
    folder = pytestconfig.getoption("--engine")
    reason = engines.missing(folder)
    if reason:
        pytest.skip(f"containers: {NOT_RUN}: no container engine can be started: {reason}")
    made = Engine(Path(folder).absolute(), tmp_path_factory.mktemp("engine"))
    try:
        try:
            made.start()
        except RuntimeError as error:
            pytest.skip(f"containers: {NOT_RUN}: the container engine does not start: {error}")
        made.host_image(IMAGE)
        yield made
    finally:
        made.close()


class Composed:
    """A cluster from a rendered file.

    Parameters
    ----------
    engine : Engine
        Runs it.
    folder : Path
        For its files.
    text : str
        The rendered file.
    """

    def __init__(self, engine: Engine, folder: Path, text: str) -> None:
        self.engine = engine
        self._files = [folder / "compose.yaml", folder / "override.json"]
        self._gates = folder / "gates"
        self._gates.mkdir(mode=0o755)
        folder.chmod(0o755)
        volumes = [*engines.mounts(), f"{ROOT}:{ROOT}:ro", f"{self._gates}:/gates:ro"]
        services = {role: {"volumes": volumes} for role in ("scheduler", "server", "worker")}
        self._files[0].write_text(text, encoding="utf-8")
        self._files[1].write_bytes(msgspec.json.encode({"services": services}))
        self._visitor = ThreadPoolExecutor(1, initializer=netns.enter, initargs=(engine.place,))
        self._access = access_of(Settings(keys=str(folder / "keys")), *CURIOUS)
        self._steps = 0

    def __enter__(self) -> "Composed":
        return self

    def __exit__(self, *_: object) -> None:
        self._visitor.shutdown()

    def compose(self, *words: str) -> str:
        """Run one ``docker compose`` command."""
        files = [word for file in self._files for word in ("-f", str(file))]
        return self.engine.docker("compose", *files, *words).stdout

    def logs(self) -> str:
        """What everybody said."""
        return self.compose("logs", "--no-color", "--no-log-prefix")

    def status(self) -> Status | None:
        """What the scheduler says now, None while it does not run."""
        number = self.number("treefold-scheduler-1")
        if not number:
            return None
        try:
            answer = self._visitor.submit(fetch, f"tcp://{number}:29700", ANSWER_MS, self._access)
            return parse(answer.result())
        except UnavailableError:
            return None

    def number(self, container: str) -> str:
        """A container's IP number, empty while it has none."""
        networks = self.engine.inspect(container)["NetworkSettings"]["Networks"]
        return str(networks["treefold_cluster"]["IPAddress"])

    def until(self, holds: Callable[[Status], bool], what: str) -> Status:
        """Wait until the status says so."""
        deadline = time.monotonic() + PATIENCE_S
        while (status := self.status()) is None or not holds(status):
            assert time.monotonic() < deadline, f"not {what}: {status}\n{self.logs()}"
        return status

    def until_given_up(self, container: str) -> Status:
        """Wait until the scheduler counts on the member in a container no more."""
        return self.until(
            lambda status: self.member(container, status).state == "dead", f"without {container}"
        )

    def until_healthy(self, *names: str) -> None:
        """Wait until the engine finds that containers are in health."""
        deadline = time.monotonic() + PATIENCE_S
        for name in names:
            while self.engine.inspect(f"treefold-{name}")["State"]["Health"]["Status"] != "healthy":
                assert time.monotonic() < deadline, f"{name} is not healthy: {self.logs()}"
                time.sleep(LOOK_S)

    def advance(self) -> Status:
        """Let the next rounds through, and wait until they are over."""
        (self._gates / str(self._steps)).touch(mode=0o644)
        self._steps += 1
        wanted = self._steps * STEP
        return self.until(lambda status: status.round >= wanted, f"in round {wanted}")

    def finish(self) -> None:
        """Let all other rounds through, and wait until everybody has left."""
        for step in range(self._steps, 100):
            (self._gates / str(step)).touch(mode=0o644)
        names = self.compose("ps", "-a", "--format", "{{.Name}}").split()
        self.engine.docker("wait", *names)

    def member(self, container: str, status: Status) -> MemberStatus:
        """The newest member that is in a container."""
        host = self.engine.inspect(container)["Config"]["Hostname"]
        return [member for member in status.members if member.host == host][-1]

    def exit_code(self, container: str) -> int:
        """How a container has ended."""
        return int(self.engine.inspect(container)["State"]["ExitCode"])


def is_whole(status: Status) -> bool:
    """Whether every shard has its two copies, and nothing is on its way."""
    shards = [shard for table in status.tables for shard in table.shards]
    return bool(shards) and all(len(one.backups) == 1 and not one.joining for one in shards)


def holders(status: Status) -> list[str]:
    """Every server that holds or gets something."""
    shards = [shard for table in status.tables for shard in table.shards]
    return [name for one in shards for name in (one.server, *one.backups, *one.joining)]


@pytest.fixture
def composed(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Composed]:
    """A cluster of three servers and three workers, made by the command."""
    words = ["--servers", "3", "--workers", "3", "--slots", "8", "--seed", "3"]
    keys.main(["init", str(tmp_path / "keys")])
    for key in (tmp_path / "keys").iterdir():
        os.chown(key, engines.USER, engines.USER)
    words += ["--keys", str(tmp_path / "keys")]
    capsys.readouterr()
    words += ["--dead-after-ms", "4000", "--heartbeat-ms", "200", "--image", IMAGE]
    render.main(["compose", *words, "--", "python", str(JOBS / JOB), "--gates", "/gates"])
    with Composed(engine, tmp_path, capsys.readouterr().out) as made:
        made.compose("up", "-d", "--quiet-pull")
        yield made
        made.compose("down", "-v", "-t", "0")


@pytest.mark.slow
def test_containers_are_killed_paused_cut_off_restarted_and_scaled_without_a_changed_bit(
    composed: Composed, alone: Callable[..., Bits], measured: list[str]
) -> None:
    docker, began = composed.engine.docker, time.monotonic()
    composed.advance()

    docker("kill", "treefold-worker-1")
    composed.advance()
    composed.until_given_up("treefold-worker-1")

    composed.until(is_whole, "two copies of everything")
    docker("kill", "treefold-server-1")
    composed.advance()
    status = composed.until_given_up("treefold-server-1")
    assert composed.member("treefold-server-1", status).name not in holders(status)

    view = status.view
    docker("exec", "treefold-scheduler-1", "python", "-c", SUICIDE, is_checked=False)
    status = composed.advance()
    assert status.view > view
    assert composed.engine.inspect("treefold-scheduler-1")["RestartCount"] == 1

    docker("pause", "treefold-worker-2")
    composed.advance()
    docker("unpause", "treefold-worker-2")

    composed.until(is_whole, "two copies of everything")
    docker("network", "disconnect", "treefold_cluster", "treefold-server-2")
    composed.advance()
    composed.until_given_up("treefold-server-2")
    docker("network", "connect", "treefold_cluster", "treefold-server-2")  # with another number

    composed.compose("up", "-d", "--no-recreate", "--scale", "worker=4", "--scale", "server=4")
    status = composed.until(lambda now: len(now.live("worker")) == 4, "four workers")
    status = composed.until(lambda now: len(now.live("server")) == 4, "four servers")
    back = composed.member("treefold-server-2", status)
    assert f"tcp://{composed.number('treefold-server-2')}:" in back.address
    composed.advance()

    composed.until(is_whole, "two copies of everything")
    composed.until_healthy("scheduler-1", "server-2", "worker-2")
    for name in ("treefold-server-3", "treefold-worker-3"):
        docker("kill", "--signal", "TERM", name)
    composed.advance()
    docker("wait", "treefold-server-3", "treefold-worker-3")
    status = composed.until(lambda now: len(now.live("server")) == 3, "three servers")
    drained = [composed.member(f"treefold-{role}-3", status) for role in ("server", "worker")]
    assert [member.state for member in drained] == ["left", "left"], composed.logs()
    assert drained[0].name not in holders(status)

    composed.finish()
    codes = {
        name: composed.exit_code(name) for name in ("treefold-scheduler-1", "treefold-worker-4")
    }
    assert set(codes.values()) == {0}, codes
    finals = [line.split()[1] for line in composed.logs().splitlines() if line.startswith("final ")]
    assert set(finals) == {alone(JOB).final}
    assert len(finals) >= 2
    measured.append(
        f"containers: {len(finals)} workers with one model, {time.monotonic() - began:.0f} s"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_every_rendered_file_is_one_for_compose(engine: Engine, file: Path) -> None:
    shown = engine.docker("compose", "-f", file, "config", "--format", "json")
    assert "warning" not in shown.stderr
    services = msgspec.json.decode(shown.stdout)["services"]
    assert sorted(services) == ["scheduler", "server", "worker"]


def test_a_file_with_an_unknown_key_is_found(engine: Engine, tmp_path: Path) -> None:
    text = FILES[0].read_text(encoding="utf-8").replace("read_only:", "readonly:")
    broken = tmp_path / "compose.yaml"
    broken.write_text(text, encoding="utf-8")
    assert engine.docker("compose", "-f", broken, "config", is_checked=False).returncode != 0
