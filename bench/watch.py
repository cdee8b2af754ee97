"""What it costs a process to be looked at: time per message that its loop adds, with and without.

``python -m bench.watch``. A core that does nothing answers each message with two effects, so that
what is measured is the loop and the watch alone. Prints medians, and the least of all windows.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from treefold.server.figures import SPANS
from treefold.transport.loop import Loop
from treefold.transport.outbox import Outbox
from treefold.transport.sockets import Hub
from treefold.transport.tally import Tally
from treefold.transport.watch import Watch
from treefold.wire.exchange import PeerLost, Received, Send, Tick
from treefold.wire.messages import Pull, StatusRequest
from treefold.wire.words import Role

WINDOWS, MESSAGES = 15, 20_000
ANSWERS = [Send(b"peer", StatusRequest(1)), Send(b"peer", StatusRequest(2))]
MESSAGE = Received(b"peer", Pull(1, 2, 3, 0, 0, 5, 0, [0, 1]))


class Idle:
    """A core that always says the same."""

    def handle(self, now_ns: int, event: Received | PeerLost | Tick) -> Sequence[Send]:
        """Two effects."""
        del now_ns, event
        return ANSWERS

    def next_deadline_ns(self) -> int | None:
        """Never."""
        return None


def main() -> None:
    """Measure."""
    hub = Hub()
    loop: Loop[Received, Send] = Loop(hub, Outbox(hub), Idle(), lambda _: [])
    counting, writing = (Watch(Role.SERVER, Tally(SPANS), lambda: None) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        writing.record(str(Path(folder) / "run.json"))
        found: dict[str, list[float]] = {}
        for _ in range(WINDOWS):
            for name, watch in (("nobody", None), ("metrics", counting), ("timeline", writing)):
                loop.watch = watch
                began_ns = time.perf_counter_ns()
                for _ in range(MESSAGES):
                    loop.feed(MESSAGE)
                if writing.timeline is not None:
                    writing.timeline.write()
                took_ns = time.perf_counter_ns() - began_ns
                found.setdefault(name, []).append(took_ns / MESSAGES / 1000)
        writing.close()
    hub.close()
    for name, times in found.items():
        print(f"{name:9} {statistics.median(times):6.2f} us, at least {min(times):.2f}")


if __name__ == "__main__":
    main()
