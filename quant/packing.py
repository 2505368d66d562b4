"""Codes of a few bits, packed without gaps into bytes."""

from __future__ import annotations

import torch


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take in one row."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (R, N) in 0 … 2^bits - 1, 1 ≤ bits ≤ 8, into bytes (R, ceil(N * bits / 8)), uint8.

    Every row is a stream of bits that begins with the least significant bit of its first code and fills each byte from
    its least significant bit; the last byte is filled up with zeros. With 4 bits a byte holds two codes, the
    first in its lower half.
    """
    codes = codes.to(torch.uint8)
    rows, count = codes.shape
    if bits == 8:
        return codes.clone()
    width = packed_bytes(count, bits)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes.unsqueeze(-1) >> shifts & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, width * 8 - count * bits)).view(rows, width, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream << places).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`: codes (R, count), uint8."""
    if bits == 8:
        return packed[:, :count]
    if bits in (1, 2, 4):  # whole codes in every byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = packed.unsqueeze(-1) >> shifts & ((1 << bits) - 1)
        return codes.flatten(1)[:, :count]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed.unsqueeze(-1) >> places & 1).flatten(1)[:, : count * bits]
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.reshape(len(packed), count, bits) << shifts).sum(-1, dtype=torch.uint8)
