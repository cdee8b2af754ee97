"""The HTTP endpoint of a process's metrics: ``/metrics`` for Prometheus, ``/targets`` to find all.

Threads of its own; it knows nothing of the process but two questions that it may ask. Only a
process that offers metrics imports this module.
"""

import hmac
import json
from collections.abc import Callable, Iterator
from http import HTTPStatus

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from treefold.common.config import Settings
from treefold.common.errors import ConfigError, UnavailableError
from treefold.common.log import logger
from treefold.common.metrics import BY_NAME, METRICS, PREFIX, Counts, Kind, Reading
from treefold.transport.web import WebHandler, WebServer, is_loopback, read_token, told

ASKERS_MAX = 8  # connections at a time; more are closed at once
PROMETHEUS_OPEN_BOUND = "+Inf"
Ask = Callable[[], list[Reading]]
AskTargets = Callable[[], list[tuple[str, str]]]
Page = Callable[[str], tuple[bytes, str]]
"""Makes a page and its type from what whoever asks accepts."""


class Endpoint:
    """Answers requests for metrics.

    Parameters
    ----------
    settings : Settings
        Where to listen, and the file of the token.
    ask : callable
        Gives all readings.
    ask_targets : callable
        Says where other processes offer theirs.

    Attributes
    ----------
    address : str
        Where others find it, as ``host:port``.

    Raises
    ------
    ConfigError
        The port is taken, or it can be reached from other machines and there is no token.
    """

    def __init__(self, settings: Settings, ask: Ask, ask_targets: AskTargets) -> None:
        host = settings.metrics_bind
        token = token_of(settings)
        try:
            self._server = _Server(host, settings.metrics_port, token)
        except (OSError, OverflowError) as error:
            where = f"{host} port {settings.metrics_port}"
            msg = f"metrics cannot be offered at {where}: {error}; metrics_port 0 takes a free port"
            raise ConfigError(msg) from error
        self._server.pages = {
            "/metrics": lambda accept: exposition(ask(), accept),
            "/targets": lambda _: (targets(ask_targets()), "application/json"),
        }
        self.address = f"{told(host, settings.advertise)}:{self._server.port}"
        self._server.start("treefold-metrics")

    def close(self) -> None:
        """Stop listening; requests that are being answered end by themselves."""
        self._server.stop()


def token_of(settings: Settings) -> str:
    """What a request has to bring along; empty for nothing.

    Raises
    ------
    ConfigError
        The file cannot be read, the token is too short, or there is none and metrics can be asked
        for from other machines.
    """
    file = settings.metrics_token_file
    if not file:
        if not is_loopback(settings.metrics_bind):
            msg = (
                f"metrics_bind is {settings.metrics_bind}, which other machines can reach: name a "
                "file with a token in metrics_token_file, or bind to 127.0.0.1"
            )
            raise ConfigError(msg)
        return ""
    return read_token(file, "metrics")


def exposition(readings: list[Reading], accept: str) -> tuple[bytes, str]:
    """Readings as Prometheus reads them, and the type of that.

    Parameters
    ----------
    readings : list of Reading
        Of one process.
    accept : str
        What whoever asks understands, as in the header of that name.
    """
    registry = CollectorRegistry()
    registry.register(_Readings(readings))
    ProcessCollector(registry=registry)
    encode, kind = choose_encoder(accept)
    return encode(registry), kind


def targets(found: list[tuple[str, str]]) -> bytes:
    """Where metrics are, as Prometheus's HTTP service discovery reads it."""
    listed = [{"targets": [where], "labels": {"instance": who}} for where, who in found]
    return json.dumps(listed).encode()


class _Readings(Collector):
    """Readings as families of one role; those without a value are named all the same."""

    def __init__(self, readings: list[Reading]) -> None:
        self._by_name: dict[str, list[Reading]] = {}
        for reading in readings:
            self._by_name.setdefault(reading.name, []).append(reading)
        [build] = self._by_name["build_info"]
        self._role = build.labels[1]

    def collect(self) -> Iterator[Family]:
        """Every metric of the role."""
        for metric in METRICS:
            if self._role in metric.roles:
                yield self._family(metric.name)

    def _family(self, name: str) -> Family:
        metric, labels = BY_NAME[name], list(BY_NAME[name].labels)
        text = f"{metric.text}."
        counter, gauge, histogram = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
        found = self._by_name.get(name, [])
        if metric.kind is Kind.HISTOGRAM:
            family = histogram(PREFIX + name, text, labels=labels)
            for one in found:
                if isinstance(one.value, Counts):
                    family.add_metric(one.labels, _cumulated(one.value), one.value.sum)
            return family
        kind = counter if metric.kind is Kind.COUNTER else gauge
        plain = kind(PREFIX + name, text, labels=labels)
        for one in found:
            if not isinstance(one.value, Counts):
                plain.add_metric(one.labels, one.value)
        return plain


def _cumulated(value: Counts) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip([*value.bounds, None], value.counts, strict=True):
        total += count
        buckets.append((PROMETHEUS_OPEN_BOUND if bound is None else repr(bound), float(total)))
    return buckets


class _Server(WebServer):
    """Has pages."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self.pages: dict[str, Page] = {}
        self.token = token
        super().__init__(host, port, _Handler, ASKERS_MAX)


class _Handler(WebHandler):
    """One request."""

    server: _Server

    def do_GET(self) -> None:  # noqa: N802 # as it is inherited
        """Answer a request for a page."""
        page = self.server.pages.get(self.path.partition("?")[0])
        if not self._is_allowed():
            self._say(HTTPStatus.UNAUTHORIZED, b"a bearer token is needed\n", "text/plain")
        elif page is None:
            names = " ".join(self.server.pages)
            self._say(HTTPStatus.NOT_FOUND, f"there are {names}\n".encode(), "text/plain")
        else:
            self._show(page)

    def _show(self, page: Page) -> None:
        try:
            body, kind = page(self.headers.get("Accept", ""))
        except UnavailableError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode(), "text/plain")
        except Exception:  # a fault in here must not cost more than a page
            logger("metrics").exception("%s cannot be made", self.path)
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, b"see the log\n", "text/plain")
        else:
            self._say(HTTPStatus.OK, body, kind)

    def _is_allowed(self) -> bool:
        token = self.server.token
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        return not token or hmac.compare_digest(given, f"Bearer {token}".encode())

    def _say(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # as it is inherited
        """Say what was asked for, to those who look for it."""
        logger("metrics").debug(format, *args)
