"""The simulated disk loses what a real one may lose, and nothing else."""

import random

from tests.sim.disk import Disk


def crashed(seed: int, synced: bytes, unsynced: bytes) -> bytes:
    """What is left of a file."""
    disk = Disk()
    disk.append("a", synced)
    disk.sync("a")
    disk.append("a", unsynced)
    assert disk.read("a") == synced + unsynced
    disk.crash(random.Random(seed))
    return disk.read("a")


def test_synced_bytes_survive_and_of_others_every_kind_of_prefix_is_seen() -> None:
    synced, unsynced = b"s" * 700, b"u" * 900
    left = [crashed(seed, synced, unsynced) for seed in range(3000)]
    assert all(data.startswith(synced) and len(data) <= 1600 for data in left)
    clean = [data for data in left if (synced + unsynced).startswith(data)]
    assert {len(data) for data in clean} >= {700, 1600}, "nothing and all of it survive, at times"
    assert len({len(data) for data in clean}) > 500, "torn anywhere"
    garbled = [data for data in left if data not in clean]
    assert 300 < len(garbled) < 1200
    # Garbage is in the last block only, and never in what was synced.
    assert all(
        (synced + unsynced).startswith(data[: max(700, (len(data) - 1) // 512 * 512)])
        for data in garbled
    )


def test_the_same_seed_gives_the_same_crash() -> None:
    assert [crashed(s, b"ab" * 99, b"cd" * 99) for s in range(50)] == [
        crashed(s, b"ab" * 99, b"cd" * 99) for s in range(50)
    ]


def test_a_rewrite_is_seen_at_once_and_a_crash_leaves_old_or_new() -> None:
    seen = set()
    for seed in range(200):
        disk = Disk()
        disk.append("a", b"old")
        disk.sync("a")
        disk.rewrite("a", b"new one")
        assert disk.read("a") == b"new one"
        disk.crash(random.Random(seed))
        seen.add(disk.read("a"))
        again = disk.read("a")
        disk.crash(random.Random(seed + 1))
        assert disk.read("a") == again, "what survived one crash survives the next"
    assert seen == {b"old", b"new one"}


def test_a_synced_rewrite_stays_and_files_do_not_share_a_fate() -> None:
    for seed in range(200):
        disk = Disk()
        disk.append("b", b"other")
        disk.sync("b")
        disk.rewrite("a", b"one")
        disk.rewrite("a", b"two")
        disk.append("a", b"!")
        disk.sync("a")
        disk.crash(random.Random(seed))
        assert (disk.read("a"), disk.read("b"), disk.read("c")) == (b"two!", b"other", b"")
