"""One seed for the three random number generators that training scripts use."""

import random
from functools import cache

import numpy as np
import torch

from treefold.common.seeds import COMPUTE, DATA, SHUFFLE, derive

WORD = 1 << 32  # numpy takes its seed in words of 32 bits
_AFTER = -1  # stands in the place of a slot for what the script does between its loops


def seed_all(seed: int) -> None:
    """Seed torch (on every device), numpy and `random`.

    Parameters
    ----------
    seed : int
        A signed 64-bit number. The same number gives torch and `random` the state that
        ``torch.manual_seed`` and ``random.seed`` give them, and numpy that of ``numpy.random.seed``
        as long as numpy takes it.
    """
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # what is left of it then, and far quicker
    random.seed(seed)
    words = seed % (1 << 64)
    np.random.seed(words if words < WORD else [words % WORD, words // WORD])


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def seed_for_data(job_seed: int, round_: int, slot: int) -> None:
    """Seed what reads and augments the samples of a slot."""
    seed_all(derive(job_seed, DATA, round_, slot))


def seed_for_compute(job_seed: int, round_: int, slot: int) -> None:
    """Seed a slot's forward and backward."""
    seed_all(derive(job_seed, COMPUTE, round_, slot))


def seed_between_loops(job_seed: int, round_: int) -> None:
    """Seed what the script does after its loop ended at ``round_``, alike on every worker."""
    seed_all(derive(job_seed, COMPUTE, round_, _AFTER))


def permutation(samples: int, seed: int, epoch: int, *path: int) -> torch.Tensor:
    """The order of an epoch.

    Parameters
    ----------
    samples : int
        Length of the data set.
    seed : int
        The sampler's seed.
    epoch : int
        Which pass.
    *path : int
        Of what in it, if the whole pass has no one order.

    Returns
    -------
    Tensor, int64 [samples]
        Each number below ``samples`` once.
    """
    generator = torch.Generator().manual_seed(derive(seed, SHUFFLE, epoch, *path))
    return torch.randperm(samples, generator=generator)
