"""How a Relax op is declared here: named operands (some optional), attributes, inferred type."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Op, register_op_attr
from tvm.sym import Analyzer

from ..errors import BadSpec

Attrs = Mapping[str, Any]
Types = dict[str, Any]
Infer = Callable[[Types, Attrs], Any]


@dataclass(frozen=True)
class OpDef:
    """One op: `operands` always, `optional` operands by name, and the type of the result.

    A call lists the optional operands it has in the attribute `extra` ("row_order bias"), so
    that the printed IR says what each argument is. `infer(types by operand name, attributes)`
    raises BadSpec with op, operand and both shapes when they do not fit.
    """

    name: str
    doc: str
    operands: tuple[str, ...]
    optional: tuple[str, ...]
    infer: Infer

    @property
    def full_name(self) -> str:
        """The name in Relax."""
        return f"relax.moec.{self.name}"

    def call(self, operands: Sequence[Any], extra: Mapping[str, Any], **attrs: Any) -> relax.Call:
        """A call; `extra` maps optional operand names to expressions (None = absent)."""
        present = {k: extra[k] for k in self.optional if extra.get(k) is not None}
        unknown = set(extra) - set(self.optional)
        if unknown:
            raise BadSpec(f"moec.{self.name} has no operand {sorted(unknown)[0]!r}")
        if present:
            attrs["extra"] = " ".join(present)
        node = tvm.ir.make_node("ir.DictAttrs", **attrs)
        return relax.Call(Op.get(self.full_name), [*operands, *present.values()], node)

    def bind(self, call: relax.Call) -> dict[str, Any]:
        """The operands of a call by name; an absent optional operand is missing."""
        extra = str(attributes(call).get("extra", "")).split()
        return dict(zip((*self.operands, *extra), call.args, strict=True))


def attributes(call: relax.Call) -> dict[str, Any]:
    """The attributes of a call as plain Python values."""
    if call.attrs is None:
        return {}
    return {str(k): _plain(call.attrs[k]) for k in call.attrs.keys()}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    if hasattr(value, "value"):
        return value.value
    return str(value)


def is_call(expr: Any, op: OpDef) -> bool:
    """Whether an expression is a call of `op`."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, Op) and expr.op.name == op.full_name


def shape_of(ty: Any) -> list[Any]:
    """The dimensions of a tensor type as a list."""
    return list(ty.shape)


def dtype_of(ty: Any) -> str:
    """The dtype of a tensor type by its plain name."""
    return str(ty.dtype).removeprefix("T.")


def tensor(shape: Sequence[Any], dtype: str) -> relax.TensorType:
    """A tensor type."""
    return relax.TensorType(list(shape), dtype)


def require(op: str, ok: bool, operand: str, got: Any, need: str) -> None:
    """Raise BadSpec naming op, operand and shapes unless `ok`."""
    if not ok:
        raise BadSpec(f"moec.{op}: operand '{operand}' is {got}, needed {need}", where=operand)


def same(a: Any, b: Any) -> bool:
    """Whether two dimensions are provably equal."""
    return bool(Analyzer().can_prove(tirx.EQ(_index(a), _index(b))))


def simplify(expr: Any) -> Any:
    """A dimension in its simplest form."""
    return Analyzer().simplify(expr)


def _index(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


_registered: set[str] = set()


def register_all(ops: Sequence[OpDef]) -> None:
    """Register ops once a process (TVM's op registry itself is process-wide)."""
    namespace = types.SimpleNamespace()
    for op in ops:
        setattr(namespace, op.name, _parser_function(op))
        if op.name in _registered:
            continue
        _registered.add(op.name)
        tvm.ir._ffi_api.RegisterOp(op.full_name, op.doc)
        node = Op.get(op.full_name)
        node.set_num_inputs(-1)
        register_op_attr(op.full_name, "FInferType", _infer(op))
        register_op_attr(op.full_name, "FPurity", True)
        register_op_attr(op.full_name, "TScriptPrinterName", op.full_name)
    # The text parser resolves R.moec.<name> through these two modules.
    import tvm.relax.script.parser as parser
    from tvm.script import relax as script

    parser.moec = namespace
    script.moec = namespace


def _infer(op: OpDef) -> Callable[[relax.Call, Any], Any]:
    def infer(call: relax.Call, _: Any) -> Any:
        named = {name: arg.ty for name, arg in op.bind(call).items()}
        return op.infer(named, attributes(call))

    return infer


def _parser_function(op: OpDef) -> Callable[..., relax.Call]:
    def make(*args: Any, **attrs: Any) -> relax.Call:
        node = tvm.ir.make_node("ir.DictAttrs", **attrs)
        return relax.Call(Op.get(op.full_name), list(args), node)

    return make
