"""Seeds: every stream its own, the same for ever, whatever runs it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treefold.common.seeds import COMPUTE, DATA, SHUFFLE, derive

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def collisions(seeds: list[int]) -> int:
    """How many streams share their seed with another."""
    return len(seeds) - len(set(seeds))


def test_streams_of_neighbouring_jobs_rounds_and_slots_never_meet() -> None:
    paths = itertools.product(range(4), (COMPUTE, DATA), range(20), range(16))
    assert collisions([derive(*path) for path in paths]) == 0


def test_added_numbers_would_meet() -> None:
    """The negative control: what ``seed + round + slot`` would do on the same streams."""
    paths = itertools.product(range(4), (COMPUTE, DATA), range(20), range(16))
    assert collisions([sum(path) for path in paths]) > 0


@given(INT64, st.sampled_from([COMPUTE, DATA, SHUFFLE]), st.lists(INT64, max_size=3))
def test_every_seed_fits_torch_numpy_and_random(job: int, purpose: int, path: list[int]) -> None:
    assert 0 <= derive(job, purpose, *path) < 1 << 63


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [
        ((0, COMPUTE, 0, 0), 5207352734819769472),
        ((7, DATA, 3, 2), 2315748713070051646),
        ((-1, SHUFFLE, 5), 526956446275014380),
    ],
)
def test_seeds_stay_what_they_were(arguments: tuple[int, ...], seed: int) -> None:
    """A job that goes on under a later treefold must draw the same numbers."""
    assert derive(*arguments) == seed


def test_a_path_is_not_confused_with_a_longer_one() -> None:
    assert derive(0, COMPUTE, 1) != derive(0, COMPUTE, 1, 0)
