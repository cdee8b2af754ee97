"""A cluster as a Compose file: text from settings, and nothing else.

The file has one service per role, so that ``--scale`` works; ranks are given by the scheduler. Its
comments are for whoever does not know this program.
"""

import json
import shlex
from dataclasses import dataclass

import msgspec

from treefold.common.config import Loaded, environment_of
from treefold.common.errors import ConfigError

STATE = "/var/lib/treefold"
PORT = 29_700
COMMAND = ("python", "digits.py")
"""What workers run if nobody says otherwise: the image's own example."""
SIZES = {"servers": 2, "workers": 4}
REPLICAS = 2
CHOSEN_HERE = (
    "scheduler", "bind", "advertise", "engine", "insecure", "rank", "journal", "checkpoint",
    "resume", "state", "keys", "audit", "max_restarts", "linger", "ledger", "tape", "timeline",
    "metrics_port", "metrics_bind", "metrics_token_file", "page_port", "page_bind",
    "page_token_file", "report",
)  # fmt: skip
"""Settings that the file chooses by itself."""
SECRET = ("keys", "metrics_token_file")
"""Settings that become secrets: files and folders as the file sees them."""
PATIENCE_S = {"connect_timeout_s": 60.0, "rejoin_grace_s": 60.0}
"""Containers of one role may be restarted or moved while those of another one wait."""

TEMPLATE = """\
# A treefold cluster. Made by:
#   treefold render compose@OPTIONS@
#
#   docker compose up --build                      train; everybody leaves when the job is done.
#                                                  Stopped before: goes on. Again: another job
#   docker compose up -d --scale worker=8          more workers, any time; servers likewise
#   docker kill treefold-server-1                  training goes on@AS_LONG@
#   docker compose down -v                         forget all jobs, with their checkpoints
name: treefold

x-member: &member
  image: @IMAGE@
@BUILD@  init: true # hands signals on before a script has its handlers
  read_only: true
  tmpfs: [/tmp]
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  pids_limit: 512
  restart: on-failure:3
  networks: [cluster]

x-settings: &settings
  TREEFOLD_SCHEDULER: tcp://scheduler:@PORT@
  TREEFOLD_BIND: tcp://*:0 # a free port, which the scheduler tells everybody
@TRUST@@WATCHED@@SETTINGS@
x-health: &health # asks the scheduler whether it hears from the member in this container
  test: [CMD, treefold, status, --here]
  interval: 10s
  timeout: 10s
  start_period: 60s
  retries: 3

# Nobody depends on anybody: members wait for the scheduler, and are told by it when the job ends.
services:
  scheduler:
    <<: *member
    command: [scheduler]
    environment:
      <<: *settings
      TREEFOLD_SCHEDULER: tcp://127.0.0.1:@PORT@ # for its health check and treefold status
      TREEFOLD_BIND: tcp://*:@PORT@
      TREEFOLD_ADVERTISE: tcp://scheduler:@PORT@
      TREEFOLD_STATE: @STATE@
@AUDIT@    volumes: ["state:@STATE@"]
    stop_grace_period: 30s
    healthcheck:
      <<: *health
      test: [CMD, treefold, status]
@KEYS_OF_SCHEDULER@
  server:
    <<: *member
    command: [server]
    environment: *settings
    deploy:
      replicas: @SERVERS@
    volumes: ["state:@STATE@"]
    stop_grace_period: 90s # SIGTERM drains: others take over the shards
    healthcheck: *health
@KEYS_OF_SERVER@
  worker:
    <<: *member
    command: @COMMAND@
    environment: *settings
    deploy:
      replicas: @WORKERS@
    stop_grace_period: 30s # SIGTERM: finish the slot, then leave
    healthcheck: *health
@KEYS_OF_WORKER@@PROMETHEUS@
networks:
  cluster:

volumes:
  state: # journal and checkpoints of every job
@SECRETS@"""

OPEN = """\
  TREEFOLD_INSECURE: "true" # no port is published: whoever is in this network is trusted
"""
CLOSED = """\
  TREEFOLD_KEYS: /run/secrets
"""
METRICS_PORT = 9_100
FOR_METRICS = "metrics.token"
WATCHED = f"""\
  TREEFOLD_METRICS_PORT: "{METRICS_PORT}" # in the network of the cluster, for whoever has the token
  TREEFOLD_METRICS_BIND: "0.0.0.0"
  TREEFOLD_METRICS_TOKEN_FILE: /run/secrets/{FOR_METRICS}
"""
PROMETHEUS = f"""
  prometheus: # docker compose --profile metrics up -d, then http://localhost:9090
    image: prom/prometheus
    profiles: [metrics]
    entrypoint: [/bin/sh, -c]
    command:
      - |
        cat > /tmp/prometheus.yml <<EOF
        global:
          scrape_interval: 5s
        scrape_configs:
          - job_name: treefold
            authorization: {{credentials_file: /run/secrets/{FOR_METRICS}}}
            http_sd_configs:
              - url: http://scheduler:{METRICS_PORT}/targets
                refresh_interval: 5s
                authorization: {{credentials_file: /run/secrets/{FOR_METRICS}}}
        EOF
        exec prometheus --config.file=/tmp/prometheus.yml --storage.tsdb.path=/tmp/data
    read_only: true
    tmpfs: [/tmp]
    secrets: [{FOR_METRICS}]
    networks: [cluster]
    ports: ["127.0.0.1:9090:9090"]
"""
KEY_ROLES = ("scheduler", "server", "worker")
SHARED = ("allowed", "observer.key")
"""The allow-list, and what health checks ask for the status with."""

BUILD = """\
  build:
    context: ../..
    dockerfile: deploy/compose/Dockerfile
    args:
      PIP_FLAGS: ${PIP_FLAGS:---extra-index-url https://download.pytorch.org/whl/cpu}
"""


@dataclass(frozen=True, slots=True)
class Composition:
    """What is to be rendered.

    Attributes
    ----------
    loaded : Loaded
        Settings that were given become those of every container; defaults are left to it.
    command : tuple of str
        What each worker runs in the image.
    image : str
        A finished image; empty: ``treefold``, built from the file's own repository.
    """

    loaded: Loaded
    command: tuple[str, ...] = COMMAND
    image: str = ""


def render(wanted: Composition) -> str:
    """The text of the Compose file.

    Parameters
    ----------
    wanted : Composition
        What is to be rendered.

    Returns
    -------
    str
        YAML.

    Raises
    ------
    ConfigError
        A word has a line break, which the file's first lines could not show.
    """
    values = settings_of(wanted.loaded)
    keys, token = wanted.loaded.settings.keys, wanted.loaded.settings.metrics_token_file
    words = [*wanted.command, wanted.image, keys, token]
    if any("\n" in word or "\r" in word for word in words):
        raise ConfigError("a word of the command or the image's name has a line break")
    lines = [f"  {key}: {quoted(value)}\n" for key, value in environment_of(values).items()]
    replacements = {
        "@OPTIONS@": options_of(values, wanted),
        "@AS_LONG@": "" if int(str(values["replicas"])) > 1 else " from the last checkpoint",
        "@IMAGE@": quoted(wanted.image or "treefold"),
        "@BUILD@": "" if wanted.image else BUILD,
        "@TRUST@": CLOSED if keys else OPEN,
        "@AUDIT@": f"      TREEFOLD_AUDIT: {STATE}/audit.jsonl\n" if keys else "",
        "@WATCHED@": WATCHED if token else "",
        "@PROMETHEUS@": PROMETHEUS if token else "",
        "@SECRETS@": secrets_from(keys, token) if keys or token else "",
        "@SETTINGS@": "".join(lines),
        "@COMMAND@": json.dumps(["worker", "--", *map(escaped, wanted.command)]),
        "@SERVERS@": str(values["servers"]),
        "@WORKERS@": str(values["workers"]),
        "@PORT@": str(PORT),
        "@STATE@": STATE,
    }
    for role in KEY_ROLES:
        own = [*SHARED, f"{role}.key"] if keys else []
        own += [FOR_METRICS] if token else []
        line = f"    secrets: [{', '.join(own)}]\n" if own else ""
        replacements[f"@KEYS_OF_{role.upper()}@"] = line
    text = TEMPLATE
    for mark, replacement in replacements.items():
        text = text.replace(mark, replacement)
    return text


def secrets_from(folder: str, token: str) -> str:
    """Keys as secrets: every role has its own, which nobody else gets. Metrics have one token."""
    names = [*SHARED, *(f"{role}.key" for role in KEY_ROLES)] if folder else []
    files = {name: f"{folder}/{name}" for name in names}
    files |= {FOR_METRICS: token} if token else {}
    lines = [f"  {name}: {{file: {json.dumps(escaped(file))}}}\n" for name, file in files.items()]
    said = " # keys are readable by user 10001 and nobody else" if folder else ""
    return f"\nsecrets:{said}\n" + "".join(lines)


def settings_of(loaded: Loaded) -> dict[str, object]:
    """Settings that the file names: sizes and patience always, others if they were given."""
    known = msgspec.to_builtins(loaded.settings)
    given = [key for key, origin in loaded.origins.items() if origin != "default"]
    values = SIZES | {key: known[key] for key in SIZES if key in given}
    values["replicas"] = known["replicas"]
    if "replicas" not in given:
        values["replicas"] = min(REPLICAS, int(values["servers"]))
    values |= PATIENCE_S
    return values | {key: known[key] for key in given if key not in CHOSEN_HERE}


def options_of(values: dict[str, object], wanted: Composition) -> str:
    """The flags that make this file again, as a person would type them."""
    shown = {key: value for key, value in values.items() if PATIENCE_S.get(key) != value}
    words = [f"--{key.replace('_', '-')} {plain(value)}" for key, value in shown.items()]
    for key in SECRET:
        value = getattr(wanted.loaded.settings, key)
        words += [f"--{key.replace('_', '-')} {shlex.quote(value)}"] if value else []
    if wanted.image:
        words.append(f"--image {shlex.quote(wanted.image)}")
    if wanted.command != COMMAND:
        words.append(f"-- {shlex.join(wanted.command)}")
    return "".join(f" {word}" for word in words)


def plain(value: object) -> str:
    """A value as a flag takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def quoted(value: str) -> str:
    """A YAML scalar: as it is if that is plainly a word, else in double quotes, as JSON's are."""
    is_word = value.isidentifier() and value.lower() not in ("true", "false", "null", "yes", "no")
    return value if is_word else json.dumps(escaped(value))


def escaped(value: str) -> str:
    """A word in which Compose finds no variable of its own."""
    return value.replace("$", "$$")
