"""WeightPlan: where the bytes of every canonical parameter of one block lie on disk.

Pure data with a JSON form. Orientation and order are stated by the plan (which a family
made) and checked against the headers; nothing here guesses from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import BadWeights
from .checking import Problem, source_problems, use_problems, weights_error
from .pieces import Array, Axis, ParamPlan, Piece
from .reading import fill, numpy_dtype


@dataclass(frozen=True)
class WeightPlan:
    """The parameters of one block, and the name prefixes on disk that belong to it alone.

    Every tensor under a prefix of `owns` must be used exactly once; those in `spare` may exist
    and are never read.
    """

    params: tuple[tuple[str, ParamPlan], ...]
    owns: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ParamPlan:
        for known, plan in self.params:
            if known == name:
                return plan
        raise BadWeights(
            f"the plan has no parameter {name!r}", need=", ".join(n for n, _ in self.params)
        )

    def problems(self, checkpoint: Checkpoint) -> list[Problem]:
        """Everything that differs between this plan and the headers of `checkpoint`."""
        out = [p for name, plan in self.params for p in source_problems(name, plan, checkpoint)]
        out += use_problems(self.params, self.owns, self.spare, checkpoint)
        return out

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise BadWeights, with the first five problems, unless the plan fits exactly."""
        problems = self.problems(checkpoint)
        if problems:
            raise weights_error(problems, checkpoint)

    def expert(
        self, checkpoint: Checkpoint, name: str, e: int, *, allow_nonfinite: bool = False
    ) -> Array:
        """Parameter `name` of expert `e`: canonical shape[1:], C-contiguous, dtype on disk.

        gate_up is [2I, H], down [H, I]; vectors are float32. Raises BadWeights on NaN or Inf,
        BadCheckpoint when the file changed meanwhile.
        """
        plan = self[name]
        if not plan.per_expert:
            raise BadWeights(f"{name} is not kept by expert")
        if not 0 <= e < plan.experts:
            raise BadWeights(f"there is no expert {e} in {name}", need=f"0 to {plan.experts - 1}")
        out = np.empty(plan.canonical, numpy_dtype(plan.dtype))
        fill(checkpoint, plan, e, out, allow_nonfinite)
        return out

    def tensor(self, checkpoint: Checkpoint, name: str, *, allow_nonfinite: bool = False) -> Array:
        """The whole canonical parameter, C-contiguous; vectors (biases, norms) as float32."""
        plan = self[name]
        out = np.empty(plan.shape, numpy_dtype(plan.dtype))
        for e in range(plan.experts):
            fill(checkpoint, plan, e, out[e] if plan.per_expert else out, allow_nonfinite)
        return out

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the manifest; `from_json` restores an equal value."""
        # Canonical JSON sorts keys, so the order of the parameters is kept beside them.
        return {
            "order": [name for name, _ in self.params],
            "params": {name: _param_json(plan) for name, plan in self.params},
            "owns": list(self.owns),
            "spare": list(self.spare),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> WeightPlan:
        """The inverse of `to_json`; raises BadWeights when `data` is no plan."""
        try:
            if sorted(data["order"]) != sorted(data["params"]):
                raise ValueError("order does not list every parameter once")
            params = tuple((str(n), _param(data["params"][n])) for n in data["order"])
            owns, spare = data["owns"], data.get("spare", [])
            return WeightPlan(params, tuple(map(str, owns)), tuple(map(str, spare)))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise BadWeights(f"this is no weight plan: {error!r}", where="plan") from None


def _param_json(plan: ParamPlan) -> dict[str, Any]:
    return {
        "shape": list(plan.shape),
        "dtype": plan.dtype,
        "per_expert": plan.per_expert,
        "pieces": [
            {
                "tensor": piece.tensor,
                "shape": list(piece.shape),
                "rows": list(piece.rows),
                "index": [a if isinstance(a, str) else list(a) for a in piece.index],
                "transpose": piece.transpose,
                **({"experts": list(piece.experts)} if piece.experts else {}),
            }
            for piece in plan.pieces
        ],
    }


def _param(data: dict[str, Any]) -> ParamPlan:
    pieces = tuple(
        Piece(
            str(p["tensor"]),
            _ints(p["shape"]),
            (int(p["rows"][0]), int(p["rows"][1])),
            tuple(_axis(a) for a in p["index"]),
            bool(p["transpose"]),
            (int(p["experts"][0]), int(p["experts"][1])) if "experts" in p else None,
        )
        for p in data["pieces"]
    )
    return ParamPlan(_ints(data["shape"]), str(data["dtype"]), bool(data["per_expert"]), pieces)


def _ints(values: Any) -> tuple[int, ...]:
    out = tuple(int(v) for v in values)
    if any(v < 0 for v in out):
        raise ValueError(f"a negative size in {out}")
    return out


def _axis(value: Any) -> Axis:
    if value == "e":
        return "e"
    if len(value) == 2 and value[0] == "e":
        return ("e", int(value[1]))
    start, stop, step = (int(v) for v in value)
    return (start, stop, step)
