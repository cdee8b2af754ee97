"""What happened to a cluster, as its status tells it."""

import json
import signal
import time

from tests.integration.test_cli import JOB, QUICK, Shell, shell
from tests.integration.test_survival import begin_round, found
from tests.support.processes import Gate

__all__ = ["shell"]

GATED = JOB.replace('print("fin', 'open(sys.argv[1]).close()\nprint("fin')


def test_the_death_of_a_worker_is_told_of_with_its_round_and_who_has_its_slots(
    shell: Shell,
) -> None:
    begun = time.clock_gettime(time.CLOCK_REALTIME)
    with Gate(shell.folder / "gate") as gate:
        sizes = ("--servers", "1", "--workers", "2", "--max-restarts", "0")
        run = shell.start("run", *sizes, *QUICK, shell.script(GATED), str(gate.path))
        begin_round(run, 3)
        found(shell, "worker-1").send_signal(signal.SIGKILL)
        told = run.line(r"INFO (worker-1 died in round \d+: .*, slots? \S.* given to worker-0)$")[1]
        events = json.loads(shell.run("status", "--json").stdout)["events"]
        assert told in [event["text"] for event in events]
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))
        times = [begun, *[event["at"] for event in events], time.clock_gettime(time.CLOCK_REALTIME)]
        assert times == sorted(times)
        gate.open()
        assert run.end() == 0
