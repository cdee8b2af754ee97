"""Backup tasks: who helps with a late round, and when that would do no good."""

from treefold.scheduler.backup import Backups

FAST, SLOW, THIRD = 1, 2, 3
EVEN = {FAST: 100, SLOW: 100}


def test_an_idle_worker_takes_the_last_slot_of_one_that_has_several_left() -> None:
    owners = {4: SLOW, 5: SLOW, 6: SLOW}
    assert Backups().grants(0, 7, owners, EVEN) == [(FAST, 6)]


def test_a_slow_idle_worker_takes_nothing_that_would_be_done_earlier_without_it() -> None:
    owners = {5: FAST}
    assert Backups().grants(0, 7, owners, {FAST: 100, SLOW: 400}) == []


def test_a_fast_idle_worker_overtakes_a_slow_one_with_a_single_slot() -> None:
    assert Backups().grants(0, 7, {5: SLOW}, {FAST: 100, SLOW: 400}) == [(FAST, 5)]


def test_a_slot_that_takes_twice_as_long_as_it_should_is_given_away_whatever_the_speeds() -> None:
    backups, speeds = Backups(), {FAST: 100, SLOW: 400}
    assert backups.grants(0, 7, {5: FAST}, speeds) == []
    assert backups.grants(199, 7, {5: FAST}, speeds) == []
    assert backups.grants(200, 7, {5: FAST}, speeds) == [(SLOW, 5)]


def test_a_helper_has_one_slot_at_a_time() -> None:
    backups, owners = Backups(), dict.fromkeys(range(8), SLOW)
    assert backups.grants(0, 7, owners, EVEN) == [(FAST, 7)]
    assert backups.grants(10, 7, owners, EVEN) == []
    del owners[7]
    assert backups.grants(100, 7, owners, EVEN) == [(FAST, 6)]


def test_a_helper_that_does_not_help_is_asked_again_after_others() -> None:
    backups, owners = Backups(), {5: SLOW}
    speeds = {FAST: 100, SLOW: 100, THIRD: 100}
    first = backups.grants(0, 7, owners, {SLOW: 400, FAST: 100})
    second = backups.grants(200, 7, owners, speeds)
    third = backups.grants(400, 7, owners, speeds)
    assert [first, second, third] == [[(FAST, 5)], [(THIRD, 5)], [(FAST, 5)]]


def test_workers_that_owe_slots_themselves_are_not_asked() -> None:
    owners = {4: FAST, 5: SLOW}
    assert Backups().grants(10_000, 7, owners, EVEN) == []


def test_each_idle_worker_gets_another_slot() -> None:
    owners = dict.fromkeys(range(6), SLOW)
    speeds = {FAST: 100, SLOW: 100, THIRD: 110}
    assert Backups().grants(0, 7, owners, speeds) == [(FAST, 5), (THIRD, 4)]


def test_the_slots_of_a_dead_worker_count_from_their_new_owner_on() -> None:
    backups = Backups()
    backups.grants(0, 7, {5: THIRD}, {**EVEN, THIRD: 100})
    assert backups.grants(10_000, 7, {5: SLOW}, EVEN) == []


def test_rounds_that_are_over_are_forgotten() -> None:
    backups = Backups()
    backups.grants(0, 7, {4: SLOW, 5: SLOW}, EVEN)
    assert backups.has_any(7, {5: SLOW})
    backups.grants(0, 9, {4: SLOW, 5: SLOW}, EVEN)
    assert not backups.has_any(7, {5: SLOW})
    assert list(backups._rounds) == [9]
