"""Edit a function that is one straight line of bindings: what every pass here works on.

A graph of this compiler has no control flow, so a rewrite is: look at each call with the
calls that produced its operands, and replace it by another call. What becomes unused is
removed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from ...ops.define import OpDef, is_call


class Line:
    """The bindings of one function, seen by a rewrite."""

    def __init__(self, name: str, function: relax.Function) -> None:
        self.name = name
        self.function = function
        self.bindings = [b for block in function.body.blocks for b in block.bindings]
        self._value = {b.var: b.value for b in self.bindings}

    def value(self, expr: Any) -> Any:
        """What a variable is bound to, through plain aliases; other expressions themselves."""
        while isinstance(expr, relax.Var) and expr in self._value:
            expr = self._value[expr]
        return expr

    def producer(self, expr: Any, op: OpDef) -> relax.Call | None:
        """The call of `op` that produced a value (or the tuple it was taken from), if any."""
        value = self.value(expr)
        if isinstance(value, relax.TupleGetItem):
            value = self.value(value.tuple_value)
        return value if is_call(value, op) else None

    def replace(self, var: relax.Var, value: relax.Expr) -> None:
        """Bind a variable to another value."""
        self._value[var] = value

    def rebuilt(self) -> relax.Function:
        """The function with all replacements, types inferred anew and dead bindings gone."""
        builder = relax.BlockBuilder()
        renamed: dict[Any, Any] = {}

        def substitute(expr: Any) -> Any:
            if isinstance(expr, relax.Var):
                return renamed.get(expr, expr)
            if isinstance(expr, relax.Tuple):
                return relax.Tuple([substitute(f) for f in expr.fields])
            if isinstance(expr, relax.TupleGetItem):
                return relax.TupleGetItem(substitute(expr.tuple_value), expr.index)
            if isinstance(expr, relax.Call):
                return relax.Call(expr.op, [substitute(a) for a in expr.args], expr.attrs,
                                  expr.ty_args)  # fmt: skip
            return expr

        live = self._live()
        last = self.bindings[-1].var
        with builder.function(self.name, list(self.function.params)):
            with builder.dataflow():
                for binding in self.bindings:
                    if binding.var not in live:
                        continue
                    value = substitute(self._value[binding.var])
                    emit = builder.emit_output if binding.var.same_as(last) else builder.emit
                    renamed[binding.var] = emit(value, binding.var.name)
            builder.emit_func_output(renamed[last])
        return builder.get()[self.name]

    def _live(self) -> set[Any]:
        live: set[Any] = set()

        def visit(expr: Any) -> None:
            if isinstance(expr, relax.Var):
                if expr not in live:
                    live.add(expr)
                    if expr in self._value:
                        visit(self._value[expr])
            elif isinstance(expr, relax.Tuple):
                for field in expr.fields:
                    visit(field)
            elif isinstance(expr, relax.TupleGetItem):
                visit(expr.tuple_value)
            elif isinstance(expr, relax.Call):
                for arg in expr.args:
                    visit(arg)

        visit(self.bindings[-1].var)
        return live


Rewrite = Callable[[Line, relax.Call], "relax.Call | None"]


def straight_pass(name: str, rewrite: Rewrite) -> Any:
    """A module pass that offers every call of every function to `rewrite`, first to last."""

    def transform(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        out = tvm.IRModule()
        for var, function in mod.functions.items():
            out[var] = _rewritten(var.name_hint, function, rewrite)
        return out

    return tvm.transform.module_pass(transform, opt_level=0, name=name)


def _rewritten(name: str, function: Any, rewrite: Rewrite) -> Any:
    if not isinstance(function, relax.Function):
        return function
    line = Line(name, function)
    changed = False
    for binding in line.bindings:
        value = line.value(binding.var)
        if isinstance(value, relax.Call):
            new = rewrite(line, value)
            if new is not None:
                line.replace(binding.var, new)
                changed = True
    return line.rebuilt() if changed else function
