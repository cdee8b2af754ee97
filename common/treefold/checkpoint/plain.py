"""Numbers that JSON has no words for, in words: infinities, and what is not a number."""

import math

KEY = "float"


def marked(value: object) -> object:
    """A plain value in which each such number is a dict like ``{"float": "inf"}``."""
    match value:
        case float() if not math.isfinite(value):
            return {KEY: repr(value)}
        case list() | tuple():
            return [marked(item) for item in value]
        case dict():
            return {key: marked(item) for key, item in value.items()}
    return value


def unmarked(value: object) -> object:
    """What `marked` was given; other dicts stay what they are.

    Raises
    ------
    ValueError
        Such a dict has no number in it.
    """
    match value:
        case {"float": str(text), **rest} if not rest:
            return float(text)
        case list():
            return [unmarked(item) for item in value]
        case dict():
            return {key: unmarked(item) for key, item in value.items()}
    return value
