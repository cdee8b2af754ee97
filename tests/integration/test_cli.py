"""The commands as a person uses them: real processes, real signals, and nothing left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.processes import Gate, Process, Starter, environment
from treefold.cli import trials
from treefold.common.errors import JobFailedError

END_S = 30.0  # for processes to be gone; it takes milliseconds
MARK = "TREEFOLD_TEST_MARK"
QUICK = ("--heartbeat-ms", "100", "--dead-after-ms", "1000")

JOB = """
import sys, time, torch
import treefold.torch as ps
from torch.utils.data import TensorDataset

ps.init()
model = torch.nn.Linear(4, 1)
optimizer = ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
dataset = TensorDataset(torch.arange(640.0).view(160, 4) / 640)
for (x,) in ps.batches(dataset, batch_size=4, epoch=0):
    print("round", ps.round(), flush=True)
    time.sleep(0.02)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
print("finished", ps.is_chief())
"""
WAITING = """
import signal, subprocess
subprocess.Popen(["sh", "-c", "echo ready; while :; do sleep 1000; done"])
signal.pause()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITING
TRAPPING = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
print("ready", flush=True)
signal.pause()
"""
ONCE = """
import sys
from pathlib import Path
seen = Path(sys.argv[1])
if seen.exists():
    print("second time")
else:
    seen.touch()
    print("first time", flush=True)
    {then}
"""


@dataclass
class Shell:
    """A folder of its own, in which commands run, and a mark on all that they start."""

    starter: Starter
    folder: Path
    mark: str
    started: list[Process] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *words: str, is_forked: bool = False) -> Process:
        """Start ``treefold WORDS`` in a new interpreter, or forked from the zygote."""
        values = {"TMPDIR": str(self.folder), MARK: self.mark, **self.environment}
        command = ["-m", "treefold.cli", *words]
        process = self.starter.start(words[0], command, values, is_forked=is_forked)
        self.started.append(process)
        return process

    def role(self, *words: str) -> Process:
        """Start ``treefold WORDS`` quickly."""
        return self.start(*words, is_forked=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``treefold WORDS`` to its end."""
        values = environment({"TMPDIR": str(self.folder), MARK: self.mark})
        return subprocess.run(
            [sys.executable, "-m", "treefold.cli", *words],
            env=values,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def script(self, text: str) -> str:
        """Write a script."""
        file = self.folder / "script.py"
        file.write_text(text, encoding="utf-8")
        return str(file)

    def processes(self) -> list[psutil.Process]:
        """Everything that lives and was started from here, at whatever depth."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def left(self) -> list[psutil.Process]:
        """What is still there after some time to end."""
        _, alive = psutil.wait_procs(self.processes(), timeout=END_S)
        return list(alive)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False


@pytest.fixture
def shell(starter: Starter) -> Iterator[Shell]:
    """A folder with a short path, since sockets lie in it; whatever is left is killed."""
    made = Shell(starter, Path(tempfile.mkdtemp(prefix="tf-")), uuid.uuid4().hex)
    yield made
    for left in made.processes():
        with suppress(psutil.NoSuchProcess):  # it may be ending by itself
            left.kill()
    for process in made.started:
        process.signal(signal.SIGKILL)
        process.end()
    shutil.rmtree(made.folder)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def dead_address() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


# ---- run -----------------------------------------------------------------------------------------


def test_a_run_prints_the_address_first_and_passes_output_and_exit_code_on(shell: Shell) -> None:
    script = shell.script("import sys; print('out'); print('err', file=sys.stderr); sys.exit(5)")
    run = shell.run("run", "--workers", "2", script)
    assert run.returncode == 5
    assert run.stdout.startswith("scheduler ipc://")
    assert "worker-0 | out\n" in run.stdout
    assert "worker-1 | out\n" in run.stdout
    assert "worker-0 | err\n" in run.stderr
    assert "err\n" not in run.stdout


def test_a_run_starts_any_command_and_ends_with_0_over_tcp_as_well(shell: Shell) -> None:
    run = shell.run("run", "--transport", "tcp", "--", "sh", "-c", "echo $TREEFOLD_SCHEDULER")
    assert run.returncode == 0
    address = run.stdout.splitlines()[0].partition("scheduler ")[2]
    assert address.startswith("tcp://127.0.0.1:")
    assert f"worker-0 | {address}\n" in run.stdout


def test_settings_reach_the_workers_from_flags_but_not_from_the_file_again(shell: Shell) -> None:
    (shell.folder / "t.toml").write_text('seed = 7\nslots = 3\nbind = "tcp://127.0.0.1:9"\n')
    line = "echo $TREEFOLD_SEED $TREEFOLD_SLOTS $TREEFOLD_BIND $TREEFOLD_CONFIG $OMP_NUM_THREADS"
    file = str(shell.folder / "t.toml")
    run = shell.run("run", "--config", file, "--slots", "5", "--", "sh", "-c", line)
    assert f"worker-0 | 7 5 tcp://127.0.0.1:0 {os.devnull} 1\n" in run.stdout


def test_a_job_trains_although_a_worker_is_killed_and_the_status_tells(shell: Shell) -> None:
    run = shell.start("run", "--workers", "2", *QUICK, shell.script(JOB))
    run.line(r"worker-\d \| round 5$")
    asked = shell.run("status", "--json")
    assert asked.returncode == 0, asked.stderr
    document = json.loads(asked.stdout)
    assert document["phase"] == "running"
    assert document["expected"] == {"servers": 1, "workers": 2}
    workers = [member for member in document["members"] if member["role"] == "worker"]
    assert sorted(slot for worker in workers for slot in worker["slots"]) == list(range(8))
    assert document["tables"][0]["shards"][0]["server"] == "server-0"
    psutil.Process(workers[1]["pid"]).kill()
    assert run.end() == 0, run.transcript()
    assert run.found(r"worker-\d was killed by SIGKILL: its slots go to the others")
    assert run.found(r"worker-\d \| finished True")
    assert run.found(r"treefold \| epoch 0, round \d+ of 40, [\d,]+ samples/s, loss")
    assert shell.left() == []


# ---- restarts ------------------------------------------------------------------------------------


def test_a_failing_worker_is_started_again(shell: Shell) -> None:
    script = shell.script(ONCE.format(then="sys.exit(7)"))
    run = shell.run("run", "--max-restarts", "1", script, str(shell.folder / "seen"))
    assert run.returncode == 0, run.stdout
    assert "worker-0 exited with code 7: started again (restart 1 of 1)" in run.stdout
    assert "worker-0 | second time" in run.stdout


def test_without_restarts_left_a_failing_worker_ends_the_run(shell: Shell) -> None:
    script = shell.script(ONCE.format(then="sys.exit(7)"))
    run = shell.run("run", script, str(shell.folder / "seen"))
    assert run.returncode == 7
    assert "second time" not in run.stdout


def test_when_a_server_is_killed_the_whole_job_starts_again(shell: Shell) -> None:
    script = shell.script(ONCE.format(then="import signal; signal.pause()"))
    run = shell.start("run", "--max-restarts", "1", script, str(shell.folder / "seen"))
    run.line(r"worker-0 \| first time")
    run.line(r"server-0 \| server ipc://")
    [server] = [p for p in shell.processes() if p.cmdline()[-2:] == ["treefold.cli", "server"]]
    server.kill()
    run.line(r"server-0 was killed by SIGKILL: .* starts again from the beginning")
    assert run.end() == 0, run.transcript()
    assert run.found(r"worker-0 \| second time")
    assert shell.left() == []


def test_without_restarts_a_killed_scheduler_ends_the_run_with_the_reason(shell: Shell) -> None:
    run = shell.start("run", shell.script(WAITING))
    run.line(r"worker-0 \| ready")
    [one] = [p for p in shell.processes() if p.cmdline()[-2:] == ["treefold.cli", "scheduler"]]
    one.kill()
    assert run.end() == 1
    assert run.found("scheduler was killed by SIGKILL; ending the run")
    assert shell.left() == []


# ---- endings -------------------------------------------------------------------------------------


def test_one_interrupt_ends_everything(shell: Shell) -> None:
    run = shell.start("run", "--workers", "2", shell.script(WAITING))
    run.line(r"worker-1 \| ready")
    run.line(r"worker-0 \| ready")
    shells = {process.pid for process in shell.processes() if process.name() == "sh"}
    forked = {process.pid for process in shell.processes() if process.ppid() in shells}  # `sleep`
    assert len(shells - forked) == 2
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert shell.left() == []
    assert list(shell.folder.glob("treefold-*/*")) == []


def test_a_second_interrupt_kills_whoever_does_not_listen(shell: Shell) -> None:
    run = shell.start("run", shell.script(STUBBORN))
    run.line(r"worker-0 \| ready")
    run.signal(signal.SIGINT)
    run.line("SIGINT: ending the job; once more kills it at once")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert run.found("SIGINT: killing what is left")
    assert shell.left() == []


def test_a_terminated_launcher_takes_everybody_along(shell: Shell) -> None:
    run = shell.start("run", shell.script(WAITING))
    run.line(r"worker-0 \| ready")
    run.signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert shell.left() == []


def test_a_killed_launcher_leaves_no_process_and_no_folder(shell: Shell) -> None:
    run = shell.start("run", "--workers", "2", shell.script(STUBBORN))
    run.line(r"worker-1 \| ready")
    run.line(r"worker-0 \| ready")
    run.signal(signal.SIGKILL)
    assert shell.left() == []
    assert [path for path in shell.folder.glob("treefold-*") if path.name[9:] != user()] == []


def test_without_its_guard_a_killed_launcher_would_leave_processes(shell: Shell) -> None:
    run = shell.start("run", shell.script(STUBBORN))
    run.line(r"worker-0 \| ready")
    [guard] = [p for p in shell.processes() if p.cmdline()[-1].endswith("guard.py")]
    guard.kill()
    run.signal(signal.SIGKILL)
    assert "sh" in [process.name() for process in shell.processes()]


def test_a_cluster_that_does_not_form_ends_with_3_and_the_missing_members(shell: Shell) -> None:
    run = shell.start("run", "--workers", "2", "--form-timeout-s", "0.5", shell.script(WAITING))
    assert run.end() == 3
    assert run.found("did not form within .* missing: .*worker-0, worker-1")
    assert shell.left() == []


def test_a_reader_that_goes_away_ends_the_run(shell: Shell) -> None:
    script = shell.script(WAITING)
    line = f"{sys.executable} -m treefold.cli run {script} | head -n 1; exit ${{PIPESTATUS[0]}}"
    values = environment({"TMPDIR": str(shell.folder), MARK: shell.mark})
    run = subprocess.run(["bash", "-c", line], env=values, check=False, timeout=60)
    assert run.returncode == 128 + signal.SIGHUP
    assert shell.left() == []


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run"], "which script?"),
        (["run", "nowhere.py"], "there is no script 'nowhere.py'"),
        (["run", "--", "no-such-command"], "there is no command 'no-such-command'"),
        (["run", "--slot", "3", "x.py"], "unknown argument --slot; did you mean --slots?"),
        (["run", "--slots", "0", "x.py"], "Expected `int` >= 1 - at `$.slots`"),
        (["server"], "a server needs its scheduler's address"),
        (["worker", "--", "true"], "a worker needs its scheduler's address"),
        (["status", "--scheduler", "somewhere"], "an address begins with tcp://"),
        (["serve"], "invalid choice: 'serve'"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_right(
    shell: Shell, words: list[str], text: str
) -> None:
    run = shell.run(*words)
    assert run.returncode == 2
    assert text in run.stderr
    assert run.stdout == ""


# ---- single roles --------------------------------------------------------------------------------


def test_a_port_in_use_is_told_with_what_to_do(shell: Shell, taken_port: int) -> None:
    scheduler = shell.role("scheduler", "--bind", f"tcp://127.0.0.1:{taken_port}")
    assert scheduler.end() == 2
    assert scheduler.found("is in use by another process; choose another port")


@pytest.mark.parametrize(
    "words", [["server"], ["worker", "--", "true"]], ids=lambda words: str(words[0])
)
def test_a_member_whose_scheduler_is_missing_ends_with_3(
    shell: Shell, dead_address: str, words: list[str]
) -> None:
    flags = ["--scheduler", dead_address, "--connect-timeout-s", "0.5"]
    member = shell.role(words[0], *flags, *words[1:])
    assert member.end() == 3
    assert member.found("no scheduler answered")


def test_a_status_without_a_scheduler_ends_with_3(shell: Shell, dead_address: str) -> None:
    run = shell.run("status", "--scheduler", dead_address)
    assert run.returncode == 3
    assert f"no scheduler answered at {dead_address}" in run.stderr


def test_roles_started_by_hand_make_a_cluster_that_ends_by_itself(shell: Shell) -> None:
    scheduler = shell.role("scheduler", "--bind", "tcp://127.0.0.1:0")
    address = scheduler.line(r"^scheduler (tcp://127\.0\.0\.1:\d+)$")[1]
    server = shell.role("server", "--scheduler", address)
    worker = shell.start("worker", "--scheduler", address, "--slots", "2", shell.script(JOB))
    server.line(r"^server tcp://127\.0\.0\.1:\d+$")
    worker.line("finished True")
    assert [process.end() for process in (worker, server, scheduler)] == [0, 0, 0]


def test_a_worker_hands_on_signals_and_exit_codes_of_its_command(shell: Shell) -> None:
    scheduler = shell.role("scheduler", "--bind", "tcp://127.0.0.1:0")
    address = scheduler.line(r"^scheduler (tcp://\S+)$")[1]
    failing = shell.start("worker", "--scheduler", address, "--", "sh", "-c", "exit 9")
    assert failing.end() == 9
    waiting = shell.start("worker", "--scheduler", address, shell.script(TRAPPING))
    waiting.line("^ready$")
    waiting.signal(signal.SIGTERM)
    assert waiting.end() == 4
    scheduler.signal(signal.SIGTERM)
    assert scheduler.end() == 0


def test_a_status_without_an_address_needs_help_if_several_schedulers_run(shell: Shell) -> None:
    first, second = (shell.start("scheduler", "--bind", "tcp://127.0.0.1:0") for _ in range(2))
    addresses = [role.line(r"^scheduler (\S+)$")[1] for role in (first, second)]
    run = shell.run("status")
    assert run.returncode == 2
    assert all(address in run.stderr for address in addresses)
    second.signal(signal.SIGKILL)
    second.end()
    table = shell.run("status")
    assert table.returncode == 0, table.stderr
    assert "forming" in table.stdout
    assert "0 of 1 servers and 0 of 1 workers are there" in table.stdout


def test_the_doctor_makes_a_round_trip_through_threads_and_through_processes(shell: Shell) -> None:
    run = shell.run("doctor")
    assert run.stdout.count("round trip of 100,000 elements, equal to plain torch bit for bit") == 2
    failed = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("FAIL")]
    assert failed in ([], ["port"]), run.stdout  # which somebody else of this machine may hold
    assert run.returncode == len(failed)


def test_the_doctor_says_what_a_trial_with_processes_said_when_it_failed() -> None:
    with pytest.raises(JobFailedError, match=r"ended with exit code 6(.|\n)*worker-0 . oops"):
        trials.processes(["sh", "-c", "echo oops; exit 6"])


def user() -> str:
    """How the folder of this user's schedulers ends."""
    return str(os.getuid())


def test_run_with_keys_answers_who_has_one_and_tells_others_so(shell: Shell) -> None:
    folder = str(shell.folder / "keys")
    assert shell.run("keys", "init", folder).returncode == 0
    script = shell.script(JOB.replace('print("fin', 'open(sys.argv[1]).close()\nprint("fin'))
    with Gate(shell.folder / "gate") as gate:
        run = shell.start("run", "--servers", "1", "--keys", folder, *QUICK, script, str(gate.path))
        run.line("round 3")
        refused = shell.run("status")
        assert refused.returncode == 3
        assert "takes connections with keys only; pass --keys DIR" in refused.stderr
        assert "worker-0" in shell.run("status", "--keys", folder).stdout
        gate.open()
        assert run.end() == 0
    run.line("finished True")
