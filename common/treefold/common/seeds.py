"""Seeds for everything random in a job, derived from the job seed by hashing, never by arithmetic.

Adding numbers (``seed + round``) makes neighbouring streams collide; a keyed hash does not.
"""

import hashlib
import struct

COMPUTE = 1  # a slot's forward and backward (dropout and the like)
DATA = 2  # a slot's samples as they are read and augmented
SHUFFLE = 3  # an epoch's permutation


def derive(job_seed: int, purpose: int, *path: int) -> int:
    """Seed of one stream, 63 bits.

    Parameters
    ----------
    job_seed : int
        The job's seed, as a signed 64-bit number.
    purpose : int
        `COMPUTE`, `DATA` or `SHUFFLE`, so that streams for different uses never meet.
    *path : int
        What the stream belongs to: ``(round, slot)``, ``(epoch,)`` or ``(epoch, data shard)``.

    Returns
    -------
    int
        A number in ``[0, 2**63)``. Source: BLAKE2b (RFC 7693) over the packed integers.
    """
    packed = struct.pack(f"<{len(path) + 2}q", job_seed, purpose, *path)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
