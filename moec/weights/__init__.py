"""WeightPlan: from the tensors on disk to the canonical parameters of one block."""

from .checking import Problem, weights_error
from .pieces import Array, Axis, ParamPlan, Piece
from .plan import WeightPlan

__all__ = ["Array", "Axis", "ParamPlan", "Piece", "Problem", "WeightPlan", "weights_error"]
