"""A bill for people: one line per layer, and the totals beside full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def layer_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The per-layer table, for rich."""
    table = Table("kind", box=None)
    table.add_column("layer", overflow="fold")
    for header in ("params", "MMAC", "bits", "GBOPs", "kB"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in entries:
        bits = "x".join(f"{width:g}" for width in line["bits"])
        numbers = (f"{line['macs'] / 1e6:,.2f}", bits, f"{line['bops'] / 1e9:,.2f}", f"{line['size_bytes'] / 1e3:,.1f}")
        table.add_row(line["kind"], line["name"], f"{line['params']:,}", *numbers)
    return table


def total_table(name: str, total: Mapping[str, Any]) -> Table:
    """The totals beside full precision, for rich."""
    table = Table("", "quantized", "fp32", "ratio", title=name)
    for label, key, unit in (
        ("GBOPs", "bops", 1e9),
        ("GBOPs with attention matmuls", "bops_with_attention", 1e9),
        ("MB", "size_bytes", 1e6),
    ):
        full = total[key.replace("bops", "bops_fp32") if "bops" in key else f"{key}_fp32"]
        table.add_row(label, f"{total[key] / unit:,.3f}", f"{full / unit:,.3f}", f"{full / total[key]:.2f}")
    table.add_row("bits per weight", f"{total['bits_per_weight']:.3f}", "32", f"{32 / total['bits_per_weight']:.2f}")
    return table
