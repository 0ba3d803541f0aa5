"""Metrics and costs as text: their usual order, their decimals, their units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

ORDER = (
    "fd*",
    "fid*",
    "sfd*",
    "sfid*",
    "kd*",
    "kid*",
    "is*",
    "precision*",
    "recall*",
    "exact*",
    "nll*",
    "psnr*",
    "ssim*",
    "cosine*",
)
UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def ordered(names: Iterable[str]) -> list[str]:
    """Metric names in the field's usual order, unknown ones last, by name."""
    ranks = {name: next((i for i, pattern in enumerate(ORDER) if fnmatch(name, pattern)), len(ORDER)) for name in names}
    return sorted(ranks, key=lambda name: (ranks[name], len(name), name))


def first_fits(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The first name that fits each pattern, each name once."""
    matches = (next((name for name in ordered(names) if fnmatch(name, pattern)), None) for pattern in patterns)
    return list(dict.fromkeys(name for name in matches if name))


def decimals(value: float) -> int:
    """Decimals that show four significant digits of a value, three of one below 1; at most four decimals."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return max(0, min(4, 3 - exponent if exponent >= 0 else 2 - exponent))


def quantity(key: str, value: float) -> str:
    """A cost for reading: 1.234 G, 4.32 MB, 4.13 bits."""
    if key.startswith("bits_per_"):
        return f"{value:.2f}"
    unit, scale = next((pair for pair in UNITS if value >= pair[1]), ("", 1))
    return f"{value / scale:.3g} {unit}{'B' if key == 'size_bytes' else ''}".rstrip()
