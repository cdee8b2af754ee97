"""The scheduler process: one socket around `treefold.scheduler.core`. Decides nothing."""

import os
import signal
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from treefold.checkpoint.manifest import Manifest
from treefold.checkpoint.store import Store
from treefold.common.audit import Audit
from treefold.common.background import Background
from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.common.facts import HostFacts
from treefold.common.failpoints import arm, failpoint
from treefold.common.host import host_facts, wall_lead_ns
from treefold.common.log import logger
from treefold.common.process import random_number
from treefold.scheduler import jobs, memory, records
from treefold.scheduler.admission import SchedulerLimits
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import (
    CheckpointChosen,
    ChooseCheckpoint,
    Effect,
    Event,
    ManifestWritten,
    Persist,
    Rewrite,
    SchedulerStopAsked,
    WriteManifest,
)
from treefold.scheduler.figures import SchedulerTally
from treefold.scheduler.journal import Journal
from treefold.scheduler.points import POINTS
from treefold.transport.hosts import listening, told
from treefold.transport.hubs import hub_of
from treefold.transport.loop import Loop
from treefold.transport.outbox import Outbox
from treefold.transport.sockets import CONTROL_FRAME_BYTES_MAX, Context
from treefold.transport.watch import watch_for
from treefold.wire.exchange import Halt, Level, Note, Peer, PeerLost, Received, Send
from treefold.wire.membership import MS
from treefold.wire.messages import Accepted, AnyMessage, DrainRequest, Refused, Registered
from treefold.wire.permissions import KeyRole
from treefold.wire.words import Outcome, Role

if TYPE_CHECKING:
    from treefold.scheduler.live import Live

LISTENER = "listener"
PAGE = "the live page"  # in whose name the core is asked to drain a member
CLOSING_MAX_S = 10.0  # for old checkpoints to be removed


class SchedulerShell:
    """The scheduler, in a process or a thread of its own.

    Parameters
    ----------
    settings : Settings
        Where to listen, and how many of each role form the cluster.
    context : Context, optional
        Shared with other roles when several live in one process.
    """

    def __init__(self, settings: Settings, context: Context | None = None) -> None:
        self._audit = Audit(settings.audit, "scheduler") if settings.audit else None
        self._hub = hub_of(settings, KeyRole.SCHEDULER, context, self._audit)
        self._outbox = Outbox(self._hub)
        bound = self._hub.listen(
            LISTENER,
            listening(settings.bind),
            insecure=settings.insecure,
            frame_bytes_max=CONTROL_FRAME_BYTES_MAX,
        )
        self.address = told(bound, settings.advertise, "")
        self._log = logger("scheduler")
        self._settings = settings
        self._core = SchedulerCore(limits_of(settings))
        self._background: Background[Event] = Background(
            "treefold-checkpoints", self._hub.bell.ring
        )
        self._journal = Journal(Path(settings.journal)) if settings.journal else None
        if self._journal is not None:
            self._take_up(self._journal)
        if not (self._journal and self._journal.payloads):
            self._begin(settings)
        self._loop: Loop[Event, Effect] = Loop(self._hub, self._outbox, self._core, self._perform)
        self._loop.points = POINTS
        self._loop.gate.learn(state.member for state in self._core.roster.by_incarnation.values())
        self._core.facts = _told_of(host_facts())
        tally = SchedulerTally(self._core, self._hub.traffic)
        self._loop.watch = watch_for(settings, Role.SCHEDULER, tally, self._hub.bell.ring)
        self._answer: Accepted | Refused | None = None
        self._live = self._show(settings)
        self._halt: Halt | None = None
        self._stop: SchedulerStopAsked | None = None

    @property
    def link(self) -> str:
        """Opens the live page in a browser; empty if there is none."""
        return "" if self._live is None else self._live.link

    @property
    def ending(self) -> str:
        """Why the process ends, once `run` has returned."""
        return "" if self._halt is None else self._halt.text

    def run(self) -> int:
        """Serve until the job has ended; returns the exit status."""
        self._core.events.wall_s = wall_lead_ns() / 1e9
        self._loop.feed(PeerLost(None))  # starts the core's clock
        while self._halt is None:
            self._core.events.wall_s = wall_lead_ns() / 1e9
            self._loop.turn()
            if self._stop is not None:
                stop, self._stop = self._stop, None
                self._loop.feed(stop)
            for event in self._background.events():
                self._loop.feed(event)
            if self._live is not None:
                self._live.turn()
        self._loop.flush()
        if self._live is not None:
            self._live.close()
        self._background.close(CLOSING_MAX_S)
        self._loop.end_watch()
        self._hub.close()
        if self._journal is not None:
            self._journal.close()
        if self._audit is not None:
            self._audit.close()
        return self._halt.status

    def stop(self, outcome: Outcome, text: str) -> None:
        """Ask the scheduler to end the job; may be called from a signal handler or a thread."""
        self._stop = SchedulerStopAsked(outcome, text)
        self._hub.bell.ring()

    def _show(self, settings: Settings) -> "Live | None":
        """A live page or a report, if the settings ask for any."""
        if settings.page_port < 0 and not settings.report:
            return None
        from treefold.scheduler.live import Live  # noqa: PLC0415 # who shows nothing need not wait

        return Live(settings, self._core, self._hub.bell.ring, self._drain, self._audit)

    def _drain(self, member: str) -> str:
        """Ask for a member to be drained as `treefold drain` does; why not, or nothing."""
        self._loop.feed(Received(PAGE, DrainRequest(1, member)))
        answer, self._answer = self._answer, None
        return answer.text if isinstance(answer, Refused) else ""

    def _take_up(self, journal: Journal) -> None:
        """Go on where another scheduler stopped, if it wrote anything down."""
        if journal.torn:
            self._log.warning("%s", journal.torn)
        if journal.payloads:
            found = [record for one in journal.payloads for record in records.decode(one)]
            memory.take_up(self._core, found)
            failpoint("scheduler.journal_read")

    def _perform(self, effect: Effect) -> list[Event]:
        match effect:
            case Send(peer, message, _):
                self._send(peer, message)
            case Persist(found):
                if self._journal is not None:
                    self._journal.append(records.encode(found))
                    self._journal.sync()
            case Rewrite(found):
                if self._journal is not None:
                    self._journal.rewrite([records.encode(found)])
            case WriteManifest(manifest):
                self._background.do(lambda: self._write(manifest))
            case ChooseCheckpoint():
                self._background.do(self._choose)
            case Note(level, text, _):
                self._log.log(level, text)
                self._note(text if level >= Level.INFO else "")
            case Halt():
                self._halt = self._halt or effect  # what came in the same batch changes nothing
        return []

    def _send(self, peer: Peer, message: AnyMessage) -> None:
        if isinstance(message, Registered):
            self._loop.gate.learn([self._core.roster.by_incarnation[message.incarnation].member])
        if isinstance(peer, bytes):
            self._outbox.send(LISTENER, peer, message)
        elif peer == PAGE and isinstance(message, Accepted | Refused):
            self._answer = message

    def _note(self, text: str, what: str = "cluster") -> None:
        """What happened to members and to the job belongs into the audit log as well."""
        if self._audit is not None and text:
            self._audit.note(what, text)

    def _begin(self, settings: Settings) -> None:
        """Begin a job, with the newest checkpoint that is whole if it is to go on from one."""
        made = settings.checkpoint
        if made and made != settings.resume and Store(made).versions():
            msg = f"there are checkpoints in {made}: go on from them with --resume {made}"
            raise ConfigError(f"{msg}, or choose another folder")
        if settings.resume:
            self._resume(settings)

    def _resume(self, settings: Settings) -> None:
        store = Store(settings.resume)
        manifest = store.newest_whole(self._log.warning)
        if manifest is None:
            raise ConfigError(f"there is no checkpoint in {settings.resume} to go on from")
        for key, value in (("slots", manifest.slots), ("seed", manifest.seed)):
            if getattr(settings, key) != value:
                msg = f"the checkpoint is of a job with {key}={value}, not {getattr(settings, key)}"
                raise ConfigError(f"{msg}: pass --{key} {value}")
        self._prepare(settings.resume, manifest)
        self._core.begin_from(settings.resume, manifest)

    def _prepare(self, folder: str, manifest: Manifest) -> None:
        """What lies beyond the version that the job goes on from is made anew."""
        self._note(f"version {manifest.version} in {folder}", "restore")
        made = self._settings.checkpoint
        kept = manifest.version if folder == made else -1
        for name in Store(made).set_aside(kept) if made else []:
            self._log.warning("%s is set aside: the job goes on from before it", name)

    def _write(self, manifest: Manifest) -> Event:
        """Write a manifest, and remove checkpoints that are one too many."""
        store, version = Store(self._settings.checkpoint), manifest.version
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())  # nothing is decided by it
        package = metadata.version("treefold")
        try:
            if version not in store.versions():  # or it is there, and nobody was told
                store.commit(msgspec.structs.replace(manifest, created=now, package=package))
        except Exception as error:  # filesystems of other packages raise what they like
            return ManifestWritten(version, f"{type(error).__name__}: {error}")
        try:
            store.prune(self._settings.checkpoints_kept)
        except Exception as error:  # as above; the new one counts all the same
            self._log.warning("old checkpoints are not removed: %r", error)
        return ManifestWritten(version, "")

    def _choose(self) -> Event:
        """The newest checkpoint that is whole."""
        for folder in (self._settings.checkpoint, self._settings.resume):
            if not folder:
                continue
            try:
                manifest = Store(folder).newest_whole(self._log.warning)
            except Exception as error:  # as above
                self._log.warning("%s cannot be read: %r", folder, error)
                continue
            if manifest is not None:
                self._prepare(folder, manifest)
                return CheckpointChosen(folder, manifest)
        return CheckpointChosen("", None)


def _told_of(facts: HostFacts) -> dict[str, object]:
    """What a status says of where the scheduler runs."""
    known = {key: getattr(facts, key) for key in ("package", "python", "torch", "files_max")}
    return {**known, "host": socket.gethostname(), "pid": os.getpid()}


def limits_of(settings: Settings) -> SchedulerLimits:
    """The core's settings, with a fresh number for this job."""
    return SchedulerLimits(
        job=random_number(),
        servers=settings.servers,
        workers=settings.workers,
        heartbeat_ns=settings.heartbeat_ms * MS,
        dead_after_ns=settings.dead_after_ms * MS,
        server_dead_after_ns=settings.server_dead_after_ms * MS,
        form_timeout_ns=int(settings.form_timeout_s * 1000) * MS,
        rejoin_grace_ns=int(settings.rejoin_grace_s * 1000) * MS,
        is_lingering=settings.linger,
        is_restarting=settings.max_restarts > 0,
        replicas=settings.replicas,
        checkpoint=settings.checkpoint,
        checkpoint_every=settings.checkpoint_every if settings.checkpoint else 0,
        slots=settings.slots,
        seed=settings.seed,
    )


def main(settings: Settings, announce: Callable[[str, str], None]) -> int:
    """Run the scheduler in this process until the job has ended.

    Parameters
    ----------
    settings : Settings
        Where to listen, and how many of each role form the cluster.
    announce : callable
        Told the bound address, and the link to the live page if there is one, before anything else
        happens.

    Returns
    -------
    int
        Exit status.
    """
    arm("scheduler")
    shell = SchedulerShell(jobs.chosen(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop_once(shell))
    announce(shell.address, shell.link)
    status = shell.run()
    if status:
        logger("scheduler").error(shell.ending)
    return status


def _stop_once(shell: SchedulerShell) -> None:
    """First signal: end the job. Second: the default, which ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    shell.stop(Outcome.DRAINED, "the scheduler was asked to stop")
