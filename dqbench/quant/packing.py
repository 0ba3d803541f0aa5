"""Integer codes <-> bytes, and the seal that tells packed tensors from damaged ones.

Codes of width w <= 8 form one stream of bits, least significant first: code i is in bits [i w, (i + 1) w), and bit j of
the stream is bit j % 8 of byte j // 8. The last byte is filled up with zeros. Wider codes are two such streams, the low
8 bits of all codes and then their rest. Either way a tensor takes ceil(count * w / 8) bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from zlib import crc32
from zlib import error as ZlibError

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from dqbench.errors import UserError

MAX_WIDTH = 32
PIECE = 2**18  # codes that are words of 64 bits at a time; a multiple of 8, so that pieces begin with a byte
SEAL = "crc32"
UNREADABLE = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, ZlibError)


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return -(-count * width // 8)


def pack(codes: Tensor, width: int) -> Tensor:
    """Bytes, uint8 [ceil(N w / 8)], of integer codes of any shape with N elements in [0, 2^w); w in 0..32."""
    flat = codes.detach().cpu().flatten().numpy()
    if not 0 <= width <= MAX_WIDTH or flat.size and (flat.min() < 0 or int(flat.max()) >> width):
        raise ValueError(f"codes must lie in [0, 2^width) with width in 0..{MAX_WIDTH}, got width {width}")
    streams = [_pack(flat, shift, min(8, width - shift)) for shift in range(0, max(1, width), 8)]
    return torch.from_numpy(np.concatenate(streams))


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """The `count` codes, [count], uint8 where w <= 8 and int64 else. Raises UserError for another number of bytes."""
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(count, width):
        expected = f"{packed_bytes(count, width)} bytes for {count} codes of {width} bits"
        raise UserError(f"packed codes are truncated or altered: {packed.numel()} {packed.dtype} instead of {expected}")
    codes, rest = np.zeros(count, dtype=np.uint8 if width <= 8 else np.int64), packed.cpu().numpy()
    for shift in range(0, width, 8):
        own = min(8, width - shift)
        for first in range(0, count, PIECE):
            piece, place = codes[first : first + PIECE], first * own // 8
            found = _unpack_piece(rest[place : place + packed_bytes(piece.size, own)], piece.size, own)
            piece |= (found << np.uint64(shift)).astype(codes.dtype)
        rest = rest[packed_bytes(count, own) :]
    return torch.from_numpy(codes)


def _pack(codes: np.ndarray, shift: int, width: int) -> np.ndarray:
    """The stream of bits shift to shift + width of all codes."""
    starts = range(0, codes.size, PIECE)
    whole = (codes[first : first + PIECE].astype("<u8") >> np.uint64(shift) for first in starts)
    parts = [_pack_piece(part & np.uint64(2**width - 1), width) for part in whole]
    return np.concatenate([np.zeros(0, dtype=np.uint8), *parts])


def _pack_piece(codes: np.ndarray, width: int) -> np.ndarray:
    words = np.zeros(-(-codes.size // 8), dtype="<u8")  # 8 codes are a word of `width` bytes
    for place in range(8):
        part = codes[place::8]
        words[: part.size] |= part << np.uint64(place * width)
    return words.view(np.uint8).reshape(-1, 8)[:, :width].flatten()[: packed_bytes(codes.size, width)]


def _unpack_piece(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    padded = np.zeros((-(-count // 8), 8), dtype=np.uint8)
    whole = np.zeros(len(padded) * width, dtype=np.uint8)
    whole[: packed.size] = packed
    padded[:, :width] = whole.reshape(-1, width) if width else 0
    words = padded.view("<u8").ravel()
    codes = np.empty((len(words), 8), dtype="<u8")
    for place in range(8):
        codes[:, place] = words >> np.uint64(place * width) & np.uint64(2**width - 1)
    return codes.ravel()[:count]


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def seal(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Any]:
    """`header` with a checksum of itself and of the tensors."""
    unsealed = without_seal(header)
    return {**unsealed, SEAL: checksum(tensors, unsealed)}


def check_seal(tensors: Mapping[str, Tensor], header: Mapping[str, Any], what: str) -> None:
    """Raise UserError unless header and tensors are those that were sealed together."""
    if header.get(SEAL) != checksum(tensors, without_seal(header)):
        raise UserError(f"{what} is truncated or altered: its checksum does not match")


def without_seal(header: Mapping[str, Any]) -> dict[str, Any]:
    """`header` without its checksum."""
    return {key: value for key, value in header.items() if key != SEAL}


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """CRC-32 of the header as JSON, then of every tensor's name, dtype, shape and bytes, in the order of names."""
    total = crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total = crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = crc32(tensor.flatten().view(torch.uint8).numpy(), total)
    return total


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Inside: whatever damaged or foreign content makes a reader raise becomes a UserError, one line."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{what} is truncated or altered: {reason}") from error


def name_of(dtype: torch.dtype) -> str:
    """'float32'."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype that name_of() spelt. Raises ValueError for another word."""
    if not isinstance(dtype := getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name} is no dtype of tensors")
    return dtype
