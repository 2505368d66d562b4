"""Packed codes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.quant.packing import pack, packed_bytes, unpack

seeds = st.integers(0, 2**31)


some_bits = st.integers(2, 8)


@given(some_bits | st.just(1), st.integers(1, 5), st.integers(1, 70), seeds)
def test_packing_and_back(bits: int, count: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (count, packed_bytes(width, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, width), codes)


def test_two_codes_of_four_bits_share_a_byte() -> None:
    assert pack(torch.tensor([[0x3, 0xA, 0xF]]), 4).tolist() == [[0xA3, 0x0F]]
    # five bits: a stream of bits, least significant first
    codes = [17, 3, 30, 9]
    stream = sum(code << (5 * i) for i, code in enumerate(codes))
    assert pack(torch.tensor([codes]), 5).tolist() == [list(stream.to_bytes(3, "little"))]
