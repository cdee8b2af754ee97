"""What a chain's primary waits for before workers are told of a version."""

from treefold.server.chains import Chain
from treefold.wire.words import ShardPlace

ME, OLD, NEW = 1, 2, 3


def place(view: int, *backups: int) -> ShardPlace:
    """The chain with these backups, as of a view."""
    return ShardPlace(0, 2, 0, 1, ME, view, list(backups), [])


def changed() -> Chain:
    """A primary whose backup was replaced, which the scheduler has not confirmed yet."""
    chain = Chain(ME)
    chain.adopt(place(5, OLD))
    assert chain.confirm(5)
    chain.adopt(place(6, NEW))
    return chain


def test_a_version_waits_for_every_backup() -> None:
    chain = Chain(ME)
    chain.adopt(place(5, OLD))
    assert not chain.holds(4)
    chain.applied[OLD] = 4
    assert chain.holds(4)


def test_until_a_chain_is_confirmed_a_version_waits_for_the_backups_before_it_too() -> None:
    chain = changed()
    chain.applied[NEW] = 4
    assert not chain.holds(4), "the scheduler may still promote the old one"
    assert chain.confirm(6)
    assert chain.holds(4)


def test_a_chain_is_confirmed_by_its_own_view_and_no_older_one() -> None:
    chain = changed()
    assert not chain.confirm(5)
    assert not chain.is_confirmed
