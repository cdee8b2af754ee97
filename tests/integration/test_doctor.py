"""``treefold doctor --scheduler`` looks at a real cluster, with keys."""

import json

from tests.integration.test_cli import QUICK, Shell, shell
from tests.integration.test_events import GATED
from tests.integration.test_survival import begin_round
from tests.support.processes import Gate

__all__ = ["shell"]

SOUND = ("versions", "clocks", "files of members", "memory of members")


def test_the_doctor_looks_at_a_cluster_and_needs_a_key_for_it(shell: Shell) -> None:
    keys = str(shell.folder / "keys")
    assert shell.run("keys", "init", keys).returncode == 0
    with Gate(shell.folder / "gate") as gate:
        sizes = ("--servers", "2", "--workers", "1", "--keys", keys)
        run = shell.start("run", *sizes, *QUICK, shell.script(GATED), str(gate.path))
        address = run.line(r"^scheduler (\S+)$")[1]
        begin_round(run, 1)
        members = json.loads(shell.run("status", "--json", "--keys", keys).stdout)["members"]
        assert all(abs(one["facts"]["clock_ahead_s"]) < 1.0 for one in members)
        found = shell.run("doctor", "--scheduler", address, "--keys", keys)
        lines = {line[6:].partition("  ")[0]: line for line in found.stdout.splitlines()}
        assert all(lines[name].startswith("ok") for name in SOUND), found.stdout
        assert "the same on 3 members" in lines["versions"]
        for name in ("way to scheduler", "way to server-0", "way to server-1"):
            assert "MB/s there and" in lines[name], found.stdout
        refused = shell.run("doctor", "--scheduler", address)
        assert refused.returncode == 1
        assert "FAIL  scheduler" in refused.stdout
        assert "pass --keys" in refused.stdout
        gate.open()
        assert run.end() == 0
