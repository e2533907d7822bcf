"""Kernels as values: symbol, argument buffers with sizes linear in T, and the function itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import tirx

ITEM_BYTES = {
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "uint16": 2,
    "uint8": 1,
    "int64": 8,
    "bfloat16": 2,
}


@dataclass(frozen=True)
class PerToken:
    """A dimension of `count` rows for each token (T itself is PerToken(1), S is PerToken(K))."""

    count: int = 1


@dataclass(frozen=True)
class Buf:
    """A buffer argument: name, shape (ints and PerToken), storage dtype, owner.

    `foreign` buffers may come from the caller and are aligned to one element only; all others
    are allocated by the runtime at multiples of 64 bytes.
    """

    name: str
    shape: tuple[int | PerToken, ...]
    dtype: str
    foreign: bool = False

    def bytes(self) -> tuple[int, int]:
        """(fixed, per token) bytes; one of the two is zero."""
        size, per_token = ITEM_BYTES[self.dtype], False
        for dim in self.shape:
            per_token |= isinstance(dim, PerToken)
            size *= dim.count if isinstance(dim, PerToken) else dim
        return (0, size) if per_token else (size, 0)


@dataclass(frozen=True)
class Kernel:
    """A PrimFunc and what a caller must pass: `args` in order, then what the backend's entry adds.

    `constants` are sizes that such an entry passes as numbers, `needs` the symbols of kernels
    that the function calls itself.
    """

    symbol: str
    args: tuple[Buf, ...]
    func: tirx.PrimFunc = field(compare=False)  # the symbol is its identity
    constants: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()
