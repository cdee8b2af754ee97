"""Stacked bars as an SVG document, by text alone."""

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#997700", "#bbbbbb")
"""Told apart by people who are colour-blind too (Paul Tol's bright scheme), grey last."""
LEFT, RIGHT, BAR, GAP, TOP = 150, 70, 22, 10, 64
WIDTH = 860
KEYS_PER_ROW = 8


def stacked_bars(title: str, unit: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """Draw a horizontal bar for each name.

    Parameters
    ----------
    title, unit : str
        What the picture shows, and in which unit.
    bars : dict of str to dict of str to float
        Lengths of a bar's pieces, by what they stand for, none negative.

    Returns
    -------
    str
        An SVG document.
    """
    kinds = list(dict.fromkeys(kind for pieces in bars.values() for kind in pieces))
    colours = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(kinds)}
    longest = max((sum(pieces.values()) for pieces in bars.values()), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + len(bars) * (BAR + GAP) + GAP
    size = f'width="{WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        f'<rect {size} fill="white"/>',
        f'<text x="8" y="20" font-size="15">{escape(title)}</text>',
        *_keys(colours),
    ]
    for number, (name, pieces) in enumerate(bars.items()):
        y = TOP + number * (BAR + GAP)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        x = float(LEFT)
        for kind, length in pieces.items():
            wide = length * scale
            tip = f"<title>{escape(kind)}: {length:.2f} {escape(unit)}</title>"
            place = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}"'
            lines.append(f'<rect {place} fill="{colours[kind]}">{tip}</rect>')
            x += wide
        total = f"{sum(pieces.values()):.1f} {unit}"
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{escape(total)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _keys(colours: Mapping[str, str]) -> Sequence[str]:
    """What the colours stand for."""
    lines = []
    for number, (kind, colour) in enumerate(colours.items()):
        x, y = 8 + 104 * (number % KEYS_PER_ROW), 34 + 18 * (number // KEYS_PER_ROW)
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="{y + 11}">{escape(kind)}</text>')
    return lines
