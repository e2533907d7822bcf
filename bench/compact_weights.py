"""Weights in the compact form of moec/schedules/cuda/compact.py, packed by torch: for benchmarks.

Written from the description of the form, so that the tests can hold it against the packing
that artifacts carry; on a GPU machine there is no compiler to import it from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STRIP = 8


@dataclass(frozen=True)
class Layout:
    """Sizes of the packed form of a weight [experts, rows, inner]."""

    experts: int
    rows: int
    inner: int

    @property
    def strips(self) -> int:
        """Of an expert."""
        return self.rows // STRIP

    @property
    def header(self) -> int:
        """Bytes of a header."""
        return 128 if self.inner <= 4096 else 256

    @property
    def inline(self) -> int:
        """Exceptions in a header."""
        return (self.header - 16) // 8

    @property
    def strip_bytes(self) -> int:
        """From a strip to the next."""
        return self.header + self.inner // 64 * 768

    @property
    def spare(self) -> int:
        """Room for exceptions of an expert behind its strips: one of 1024 weights, by sixteens."""
        return -(-self.rows * self.inner // 16384) * 16

    @property
    def shape(self) -> tuple[int, int]:
        """Of the packed weight, in bytes."""
        return self.experts, self.strips * self.strip_bytes + self.spare * 8


def pack(torch: Any, weight: Any, gated: bool) -> Any:
    """[E, rows, K] bfloat16 -> [E, expert_bytes / 4] int32 on the same device.

    ValueError where the exceptions of an expert find no room.
    """
    layout = Layout(*weight.shape)
    out = torch.zeros(layout.shape, dtype=torch.uint8, device=weight.device)
    for e in range(layout.experts):
        _expert(torch, layout, weight[e], gated, out[e])
    return out.view(torch.int32)


def _expert(torch: Any, layout: Layout, weight: Any, gated: bool, out: Any) -> None:
    strips, K = layout.strips, layout.inner
    bits = weight.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    if gated:
        bits = bits.view(2, strips // 2, STRIP, K).transpose(0, 1)
    bits = bits.reshape(strips, STRIP, K)
    high = bits >> 8 & 0x7F
    own = torch.arange(strips, device=weight.device)
    counts = torch.bincount(
        (own[:, None, None] * 128 + high).flatten(), minlength=strips * 128
    ).view(strips, 128)
    # the most frequent first, of equals the lowest
    order = counts * 128 + 127 - torch.arange(128, device=weight.device)
    table = order.topk(8, 1).indices
    code = torch.full((strips, 128), -1, dtype=torch.int32, device=weight.device)
    numbers = torch.arange(8, dtype=torch.int32, device=weight.device)
    code.scatter_(1, table, numbers.expand(strips, 8))
    codes = code.gather(1, high.reshape(strips, -1).long()).view(high.shape)

    def placed(values: Any) -> Any:  # [strip, half, lane, place]
        parts = values.view(strips, STRIP, K // 32, 2, 2, 4, 2)
        return parts.permute(0, 2, 1, 5, 3, 4, 6).reshape(strips, K // 32, 32, 8)

    bits, codes = placed(bits), placed(codes)
    rare = codes < 0
    place = torch.arange(8, device=weight.device)
    sign = torch.where(place < 4, 8 * place + 7, 8 * (place - 4) + 3)
    words = (codes.clamp(min=0).long() << 4 * place) | ((bits.long() >> 15) << sign)
    words = words.sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    units = torch.cat(
        [
            (bits & 0xFF).to(torch.uint8).reshape(strips, K // 32, 256),
            words.view(torch.uint8).reshape(strips, K // 32, 128),
        ],
        -1,
    )
    body = out[: strips * layout.strip_bytes].view(strips, layout.strip_bytes)
    body[:, layout.header :] = units.reshape(strips, -1)
    body[:, :8] = table.to(torch.uint8)
    _exceptions(torch, layout, rare, bits, body, out)


def _exceptions(torch: Any, layout: Layout, rare: Any, bits: Any, body: Any, out: Any) -> None:
    strip, back, lane, place = rare.flip(1).nonzero(as_tuple=True)  # from the last half on
    half = rare.shape[1] - 1 - back
    count = torch.bincount(strip, minlength=layout.strips)
    first = torch.cumsum(count, 0) - count
    number = torch.arange(len(strip), device=rare.device) - first[strip]
    # of a lane's exceptions each names the one before it
    order = torch.sort(strip * 32 + lane, stable=True).indices
    owner, sorted_number = (strip * 32 + lane)[order], number[order]
    before = torch.full_like(number, 0xFFFF)
    same = owner[1:] == owner[:-1]
    before[order[1:][same]] = sorted_number[:-1][same]
    what = bits[strip, half, lane, place] | place << 16 | lane << 20
    where = half | before << 16
    where = torch.where(where >= 1 << 31, where - (1 << 32), where)
    entries = torch.stack([what.long(), where], 1).to(torch.int32)
    outside = (count - layout.inline).clamp(min=0)
    at = torch.where(outside > 0, torch.cumsum(outside, 0) - outside, 0)
    if int(outside.sum()) > layout.spare:
        raise ValueError(f"{int(outside.sum())} exceptions, there is room for {layout.spare}")
    body[:, 8:16] = torch.stack([count, at], 1).to(torch.int32).view(torch.uint8)
    head = torch.zeros(layout.strips, layout.inline, 2, dtype=torch.int32, device=rare.device)
    inside = number < layout.inline
    head[strip[inside], number[inside]] = entries[inside]
    body[:, 16 : layout.header] = head.view(torch.uint8).reshape(layout.strips, -1)
    pool = torch.zeros(layout.spare, 2, dtype=torch.int32, device=rare.device)
    pool[(at[strip] + number - layout.inline)[~inside]] = entries[~inside]
    out[layout.strips * layout.strip_bytes :] = pool.view(torch.uint8).reshape(-1)
