"""Packed codes and sparse formats: every shape comes back bit-exactly, sizes are the bytes, damage is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqbench.errors import UserError
from dqbench.quant.packing import check_seal, dtype_of, name_of, nbytes, pack, packed_bytes, readable, seal, unpack
from dqbench.quant.sparse_formats import FORMATS, entropy_bits, index_width, sizes
from dqbench.quant.sparse_formats import pack as pack_matrix
from dqbench.quant.sparse_formats import unpack as unpack_matrix


def bit_string(packed: torch.Tensor) -> str:
    """The stream of bits, bit 0 first."""
    return "".join(f"{byte:08b}"[::-1] for byte in packed.tolist())


@given(st.integers(0, 32).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=70))))
@settings(max_examples=200)
def test_codes_of_any_width_come_back(case):
    width, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.long), width)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(len(codes), width)
    assert unpack(packed, len(codes), width).tolist() == codes
    expected = "".join(f"{code:0{width}b}"[::-1] if width else "" for code in codes)
    if width <= 8:
        assert bit_string(packed) == expected.ljust(8 * packed.numel(), "0")


def test_the_documented_bytes():
    assert pack(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([5, 3, 7]), 3).tolist() == [0b11_011_101, 0b1]
    assert pack(torch.tensor([0x1ABCD, 0x00102]), 17).tolist() == [0xCD, 0x02, 0xAB, 0x01, 0b01]


def test_bad_codes_and_sizes_are_refused():
    for codes, width in (([16], 4), ([-1], 4), ([1], 0), ([0], 33)):
        with pytest.raises(ValueError, match="width"):
            pack(torch.tensor(codes), width)
    for damaged in (torch.zeros(4, dtype=torch.uint8), torch.zeros(5)):
        with pytest.raises(UserError, match="truncated or altered"):
            unpack(damaged, 10, 4)


@st.composite
def matrices(draw):
    """(codes, support, n_bits, a code that no entry has or None): empty, single rows, all zero, all nonzero, blocks."""
    n, m = draw(st.integers(0, 6)), draw(st.sampled_from([0, 1, 2, 3, 7, 64, 255, 256, 257, 700]))
    n_bits, density = draw(st.integers(1, 8)), draw(st.sampled_from([0.0, 0.003, 0.05, 0.5, 0.97, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    spare = draw(st.one_of(st.none(), st.integers(0, 2**n_bits - 1)))
    codes = torch.randint(2**n_bits, (n, m), generator=generator)
    codes = codes if spare is None else torch.where(codes == spare, (codes + 1) % 2**n_bits, codes)
    support = torch.rand(n, m, generator=generator) < density
    return codes, support, n_bits, spare


@given(matrices(), st.sampled_from(FORMATS))
@settings(max_examples=300)
def test_every_format_round_trips_at_its_stated_size(matrix, layout):
    codes, support, n_bits, spare = matrix
    tensors, header = pack_matrix(codes, support, n_bits, layout, spare)
    assert nbytes(tensors) == sizes(support, n_bits, spare)[layout]
    back, where = unpack_matrix(tensors, json.loads(json.dumps(header)))
    assert torch.equal(where, support) and torch.equal(back.long(), codes * support)
    assert back.dtype == torch.uint8


@given(matrices())
@settings(max_examples=100)
def test_auto_is_the_smallest(matrix):
    codes, support, n_bits, spare = matrix
    tensors, _ = pack_matrix(codes, support, n_bits, "auto", spare)
    written = {layout: nbytes(pack_matrix(codes, support, n_bits, layout, spare)[0]) for layout in FORMATS}
    assert nbytes(tensors) == min(written.values()) and written == sizes(support, n_bits, spare)


def test_index_width_at_the_edge_of_16_bits():
    assert [index_width(m) for m in (0, 1, 2, 3, 65536, 65537)] == [0, 0, 1, 2, 16, 17]
    for m in (65536, 65537):
        support = torch.zeros(2, m, dtype=torch.bool)
        support[0, 0] = support[1, m - 1] = True
        tensors, header = pack_matrix(support.int(), support, 4, "csr")
        assert len(tensors["indices"]) == packed_bytes(2, 16 if m == 65536 else 17)
        assert torch.equal(unpack_matrix(tensors, header)[1], support)


def test_a_full_block_is_no_empty_one():
    """A count of 256 does not fit in 8 bits: such blocks are listed."""
    support = torch.zeros(3, 256, dtype=torch.bool)
    support[1], support[2, 7] = True, True
    tensors, header = pack_matrix(torch.full((3, 256), 9), support, 4, "blk8")
    assert tensors["counts"].tolist() == [0, 0, 1] and tensors["full"].tolist() == [1]
    assert torch.equal(unpack_matrix(tensors, header)[1], support)


def test_sizes_are_those_of_the_formulas():
    """N = 512 x 2048, 1 % at 4 bits: the bits per element of each index, and none below the entropy."""
    support = torch.rand(512, 2048, generator=torch.Generator().manual_seed(0)) < 0.01
    n, entries = support.numel(), int(support.sum())
    found = {layout: 8 * size for layout, size in sizes(support, 4).items()}
    assert found["dense"] == 5 * n and found["bitmask"] == pytest.approx(n + 4 * entries, abs=16)
    assert found["csr"] == pytest.approx(15 * entries + 32 * 513, abs=16)
    assert found["csc"] == pytest.approx(13 * entries + 32 * 2049, abs=16)
    assert found["blk8"] == pytest.approx(12 * entries + n / 32, abs=16)
    bound = n * entropy_bits(entries / n, 4)
    assert bound < min(found.values()) < 1.1 * bound and entropy_bits(0.0, 4) == 0 and entropy_bits(1.0, 4) == 4


def test_what_is_no_packed_matrix_is_refused_in_one_line():
    """Altered values are noticed by the seal of the storage that holds them: test_rtzs.py, test_export.py."""
    support = torch.rand(7, 300, generator=torch.Generator().manual_seed(0)) < 0.1
    for layout in FORMATS:
        tensors, header = pack_matrix(torch.full((7, 300), 3), support, 4, layout)
        assert "crc32" not in header
        missing = {name: values for name, values in tensors.items() if name != "values"}
        short = tensors | {"values": tensors["values"][:-1]}
        without = {key: value for key, value in header.items() if key != "bits"}
        for wrong in ((missing, header), (short, header), (tensors, without)):
            with pytest.raises(UserError, match="truncated or altered") as error:
                unpack_matrix(*wrong)
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="version 2"):
            unpack_matrix(tensors, header | {"version": 2})


def test_readers_of_foreign_content_raise_one_line():
    for reading in (lambda: {}["scale"], lambda: None.shape, lambda: dtype_of("save"), lambda: torch.zeros(3).view(2)):
        with pytest.raises(UserError, match="x is truncated or altered: ") as error, readable("x"):
            reading()
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    with pytest.raises(UserError, match="^mine$"), readable("x"):
        raise UserError("mine")
    assert dtype_of(name_of(torch.bfloat16)) == torch.bfloat16


def test_a_seal_holds_names_shapes_and_types():
    tensors = {"a": torch.arange(6, dtype=torch.int32)}
    header = seal(tensors, {"kind": "x"})
    check_seal(tensors, header, "x")
    for changed in ({"b": tensors["a"]}, {"a": tensors["a"].reshape(2, 3)}, {"a": tensors["a"].view(torch.float32)}):
        with pytest.raises(UserError, match="checksum"):
            check_seal(changed, header, "x")
