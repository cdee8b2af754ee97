"""Prometheus's own tools, of Debian's package ``prometheus``."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import NOT_RUN

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
PATIENCE_S = 60


def tool(name: str) -> str:
    """The path of a tool; without it the test is skipped, loudly."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{NOT_RUN}: {name} is missing (apt-get install prometheus)")
    return found


def promtool(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``promtool WORDS`` with some standard input."""
    return subprocess.run(
        [tool("promtool"), *words],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def queries(dashboard: str) -> list[str]:
    """The queries of a dashboard, with an interval in place of Grafana's variable."""
    panels = json.loads(dashboard)["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "1m") for query in found]


def names_in(query: str) -> list[str]:
    """The metrics that a query names, without what a histogram adds."""
    found = re.findall(r"\b((?:treefold|process)_\w+)", query)
    return [re.sub(r"_(bucket|sum|count)$", "", name) for name in found]


def syntax_faults(wanted: list[str], folder: Path) -> str:
    """What ``promtool`` finds wrong with queries; empty if nothing."""
    rules = [{"record": f"query:number{n}", "expr": query} for n, query in enumerate(wanted)]
    file = folder / "queries.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", str(file))
    return "" if done.returncode == 0 else done.stdout + done.stderr
