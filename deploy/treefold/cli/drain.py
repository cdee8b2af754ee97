"""``treefold drain``: let others take over a member's work, and the member leave."""

import sys
import time

from treefold.cli.flags import Parser
from treefold.cli.status import found_address
from treefold.common.errors import ConfigError, UnavailableError
from treefold.transport.access import Access, access_of
from treefold.transport.hosts import located
from treefold.transport.request import Requester, check_allowed
from treefold.wire.codec import decode_all, encode
from treefold.wire.messages import Accepted, DrainRequest, Refused
from treefold.wire.permissions import KeyRole

DESCRIPTION = (
    "Take the work of MEMBER, such as server-1 or worker-2, away while training goes on. A server "
    "leaves when others hold its shards, a worker when it has finished its slot."
)
ANSWER_MS = 4_000
REPEAT_MS = 500
CALL = 1


def main(words: list[str]) -> int:
    """Ask the scheduler to drain a member.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold drain``.

    Returns
    -------
    int
        0 if the scheduler sees to it.
    """
    parser = Parser("drain", DESCRIPTION, ["scheduler", "keys"])
    parser.add_argument("member", metavar="MEMBER", help="its name, as treefold status shows it")
    options, loaded = parser.read(words)
    address = loaded.settings.scheduler or found_address()
    answer = ask(address, options.member, access_of(loaded.settings, KeyRole.ADMIN))
    if isinstance(answer, Refused):
        raise ConfigError(answer.text)
    sys.stdout.write(f"{options.member} is being drained; treefold status shows how far it is\n")
    return 0


def ask(address: str, member: str, access: Access | None = None) -> Accepted | Refused:
    """Ask until the scheduler answers.

    Raises
    ------
    AuthError
        This process is refused.
    UnavailableError
        It does not.
    """
    requester = Requester(located(address, 0), access)
    deadline_ns = time.monotonic_ns() + ANSWER_MS * 1_000_000
    try:
        while time.monotonic_ns() < deadline_ns:
            requester.send(encode(DrainRequest(CALL, member)))
            header = requester.receive(REPEAT_MS)
            for message in decode_all(header) if header is not None else ():
                if isinstance(message, Accepted | Refused) and message.call == CALL:
                    check_allowed(address, message)
                    return message
    finally:
        requester.close()
    msg = f"no scheduler answered at {address} within {ANSWER_MS / 1000:g} s; is it running there?"
    raise UnavailableError(msg)
