"""Numbers of slots, shards and rounds in few words."""

from collections.abc import Sequence


def spans(numbers: Sequence[int]) -> str:
    """Numbers in few words: ``0-3 6``.

    Parameters
    ----------
    numbers : sequence of int
        In ascending order.
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return " ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
