"""Matrices of codes with absent entries, as bytes: six layouts, exact sizes, bit-exact both ways.

codes [n, m] have n_bits each, support [n, m] says which are there; N = n m, K entries present, b = n_bits.

| layout  | tensors (row-major order of entries)                                          | bits                      |
|---------|-------------------------------------------------------------------------------|---------------------------|
| dense   | values: all N codes; `spare` (else 2^b) stands for an absent one              | N b; no spare: N (b + 1)  |
| bitmask | mask: N bits; values: K codes                                                 | N + K b                   |
| csr     | pointers: int32 [n + 1]; indices: columns of ceil(log2 m) bits; values        | 32 (n+1) + K (b + log2 m) |
| csc     | the same of the transposed matrix                                             | 32 (m+1) + K (b + log2 n) |
| blk8    | blocks of 256: counts, uint8 (full ones: 0, listed in `full`); indices; values | N / 32 + K (b + 8)       |
| rle     | runs: zeros before each entry, k bits; 2^k - 1: as many zeros and no entry    | K (k + b) + k per escape  |

Every tensor is rounded up to whole bytes. A full matrix in `dense` has N b bits without a spare code. A header says
what the tensors do not; it has no checksum: the weight storage that holds it is sealed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log2
from typing import Any

import torch
from torch import Tensor

from dqbench.errors import UserError, check_choice
from dqbench.quant import packing
from dqbench.quant.packing import packed_bytes, readable

VERSION = 1
BLOCK = 256
RUN_BITS = range(1, 17)
FORMATS = ("dense", "bitmask", "csr", "csc", "blk8", "rle")
Tensors = dict[str, Tensor]


def pack(
    codes: Tensor, support: Tensor, n_bits: int, layout: str, spare: int | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, header) of codes [n, m], integers in [0, 2^n_bits) where support [n, m] is true.

    layout: one of FORMATS, or auto for the smallest. spare: a code that no entry has, for dense.
    """
    check_choice("format", layout, (*FORMATS, "auto"))
    layout = smallest(support, n_bits, spare) if layout == "auto" else layout
    codes, support = codes.cpu(), support.cpu()
    header = {"version": VERSION, "format": layout, "shape": list(support.shape), "bits": n_bits}
    header["entries"] = int(support.sum())
    if layout == "dense":
        absent = spare_of(support, n_bits, spare)
        filled = codes if absent is None else torch.where(support, codes.long(), absent)
        tensors, own = {"values": packing.pack(filled, dense_width(n_bits, absent))}, {"spare": absent}
    else:
        tensors, own = _WRITERS[layout](support)
        by_column = layout == "csc"
        entries = codes.T[support.T] if by_column else codes[support]
        tensors["values"] = packing.pack(entries, n_bits)
    return tensors, {**header, **own}


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(codes [n, m] uint8, 0 where absent; support [n, m]). Raises UserError for what pack() did not write."""
    if header.get("version") != VERSION or header.get("format") not in FORMATS:
        found = f"format {header.get('format')}, version {header.get('version')}"
        raise UserError(f"packed matrix: {found}; readable: {', '.join(FORMATS)}, version {VERSION}")
    with readable(f"packed matrix of format {header['format']}"):
        return _unpack(tensors, header)


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    layout, shape, n_bits, entries = (header[key] for key in ("format", "shape", "bits", "entries"))
    if layout == "dense":
        width = dense_width(n_bits, header["spare"])
        codes = packing.unpack(tensors["values"], shape[0] * shape[1], width).reshape(shape)
        support = torch.ones(shape, dtype=torch.bool) if header["spare"] is None else codes != header["spare"]
        return (codes * support).to(torch.uint8), support
    shape = shape[::-1] if layout == "csc" else shape
    places = _READERS[layout](tensors, header, shape)
    codes, support = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.bool)
    codes.view(-1)[places] = packing.unpack(tensors["values"], entries, n_bits)
    support.view(-1)[places] = True
    return (codes.T.contiguous(), support.T.contiguous()) if layout == "csc" else (codes, support)


def sizes(support: Tensor, n_bits: int, spare: int | None = None) -> dict[str, int]:
    """Bytes of every layout, as pack() would write them, from support [n, m] alone."""
    (n, m), entries = support.shape, int(support.sum())
    gaps = _gaps(support)
    dense = packed_bytes(n * m, dense_width(n_bits, spare_of(support, n_bits, spare)))
    index = {
        "bitmask": packed_bytes(n * m, 1),
        "csr": 4 * (n + 1) + packed_bytes(entries, index_width(m)),
        "csc": 4 * (m + 1) + packed_bytes(entries, index_width(n)),
        "blk8": blocks_of(support) + entries + 4 * int((_block_counts(support) == BLOCK).sum()),
        "rle": min(_run_bytes(gaps, width) for width in RUN_BITS),
    }
    return {"dense": dense} | {layout: size + packed_bytes(entries, n_bits) for layout, size in index.items()}


def smallest(support: Tensor, n_bits: int, spare: int | None = None) -> str:
    """The layout of the fewest bytes."""
    found = sizes(support, n_bits, spare)
    return min(found, key=found.__getitem__)


def entropy_bits(rho: float, n_bits: int) -> float:
    """H(rho) + rho b, bits per element: what no index of a share rho of independent entries goes below, on average."""
    parts = [part for part in (rho, 1 - rho) if part > 0]
    return rho * n_bits - sum(part * log2(part) for part in parts)


def spare_of(support: Tensor, n_bits: int, spare: int | None) -> int | None:
    """The code of an absent entry in the dense layout; None where every entry is present."""
    return None if bool(support.all()) else 2**n_bits if spare is None else spare


def dense_width(n_bits: int, absent: int | None) -> int:
    """Bits of a code in the dense layout."""
    return n_bits if absent is None else max(n_bits, absent.bit_length())


def index_width(count: int) -> int:
    """Bits that number `count` places: ceil(log2 count)."""
    return max(count - 1, 0).bit_length()


def blocks_of(support: Tensor) -> int:
    """Blocks of 256 entries, the last one filled up."""
    return -(-support.numel() // BLOCK)


def _block_counts(support: Tensor) -> Tensor:
    places = support.flatten().nonzero().flatten()
    return torch.bincount(places // BLOCK, minlength=blocks_of(support))


def _gaps(support: Tensor) -> Tensor:
    places = support.flatten().nonzero().flatten()
    return torch.diff(places, prepend=places.new_tensor([-1])) - 1


def _run_bytes(gaps: Tensor, width: int) -> int:
    escapes = int((gaps // (2**width - 1)).sum())
    return packed_bytes(len(gaps) + escapes, width)


def _write_bitmask(support: Tensor) -> tuple[Tensors, dict[str, Any]]:
    return {"mask": packing.pack(support, 1)}, {}


def _read_bitmask(tensors: Mapping[str, Tensor], header: Mapping[str, Any], shape: list[int]) -> Tensor:
    return packing.unpack(tensors["mask"], shape[0] * shape[1], 1).nonzero().flatten()


def _write_csr(support: Tensor) -> tuple[Tensors, dict[str, Any]]:
    pointers = torch.cat([torch.zeros(1, dtype=torch.long), support.sum(dim=1).cumsum(0)]).to(torch.int32)
    columns = support.nonzero()[:, 1]
    return {"pointers": pointers, "indices": packing.pack(columns, index_width(support.shape[1]))}, {}


def _read_csr(tensors: Mapping[str, Tensor], header: Mapping[str, Any], shape: list[int]) -> Tensor:
    rows = torch.arange(shape[0]).repeat_interleave(torch.diff(tensors["pointers"].long()))
    return rows * shape[1] + packing.unpack(tensors["indices"], header["entries"], index_width(shape[1]))


def _write_csc(support: Tensor) -> tuple[Tensors, dict[str, Any]]:
    return _write_csr(support.T)


def _write_blk8(support: Tensor) -> tuple[Tensors, dict[str, Any]]:
    counts = _block_counts(support)
    full = (counts == BLOCK).nonzero().flatten().to(torch.int32)
    indices = support.flatten().nonzero().flatten() % BLOCK
    return {"counts": (counts % BLOCK).to(torch.uint8), "indices": indices.to(torch.uint8), "full": full}, {}


def _read_blk8(tensors: Mapping[str, Tensor], header: Mapping[str, Any], shape: list[int]) -> Tensor:
    counts = tensors["counts"].long()
    counts[tensors["full"].long()] = BLOCK
    return torch.arange(len(counts)).repeat_interleave(counts) * BLOCK + tensors["indices"]


def _write_rle(support: Tensor) -> tuple[Tensors, dict[str, Any]]:
    gaps = _gaps(support)
    width = min(RUN_BITS, key=lambda bits: _run_bytes(gaps, bits))
    escape = 2**width - 1
    ends = (gaps // escape + 1).cumsum(0)
    runs = torch.full((int(ends[-1]) if len(ends) else 0,), escape)
    runs[ends - 1] = gaps % escape
    return {"runs": packing.pack(runs, width)}, {"run_bits": width, "runs": len(runs)}


def _read_rle(tensors: Mapping[str, Tensor], header: Mapping[str, Any], shape: list[int]) -> Tensor:
    runs = packing.unpack(tensors["runs"], header["runs"], header["run_bits"]).long()
    entry = runs != 2 ** header["run_bits"] - 1
    return (runs + entry).cumsum(0)[entry] - 1


_WRITERS: dict[str, Callable[[Tensor], tuple[Tensors, dict[str, Any]]]] = {
    "bitmask": _write_bitmask,
    "csr": _write_csr,
    "csc": _write_csc,
    "blk8": _write_blk8,
    "rle": _write_rle,
}
_READERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], list[int]], Tensor]] = {
    "bitmask": _read_bitmask,
    "csr": _read_csr,
    "csc": _read_csr,
    "blk8": _read_blk8,
    "rle": _read_rle,
}
