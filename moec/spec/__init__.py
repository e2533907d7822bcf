"""What one MoE block computes, as frozen dataclasses: mathematics only.

No file layout, no tensor names, no target. Every field is validated when the value is
made; the message of a `BadSpec` names the field. Symbols used in the whole project:

    T tokens   E experts   K experts per token (top_k)   H hidden size
    I intermediate size of an expert   S = T*K rows   F width of the shared expert

Canonical weights are output-major: gate_up [E, 2I, H] (gate rows first, then up rows),
down [E, H, I]. The routing vocabulary follows vLLM's RoutingMethodType where it has a name.
"""

from .block import FLOAT_DTYPES, MoESpec, Parameter
from .experts import MAX_WIDTH, ActivationSpec, ExpertsSpec, SharedExpertSpec
from .kinds import (
    ApplyTo,
    Clamp,
    GroupScore,
    Masked,
    Nonlinearity,
    Precision,
    Renorm,
    ScaleOn,
    Score,
    Selection,
    SharedGate,
    WeightSource,
)
from .norms import LATENT_POSITIONS, NORM_POSITIONS, BlockNorms, NormSpec
from .plain import restore
from .router import MAX_EXPERTS, MAX_TOP_K, MAX_VOCABULARY, GroupSpec, RouterSpec

__all__ = [
    "FLOAT_DTYPES",
    "LATENT_POSITIONS",
    "MAX_EXPERTS",
    "MAX_TOP_K",
    "MAX_VOCABULARY",
    "MAX_WIDTH",
    "NORM_POSITIONS",
    "ActivationSpec",
    "ApplyTo",
    "BlockNorms",
    "Clamp",
    "ExpertsSpec",
    "GroupScore",
    "GroupSpec",
    "Masked",
    "MoESpec",
    "Nonlinearity",
    "NormSpec",
    "Parameter",
    "Precision",
    "Renorm",
    "RouterSpec",
    "ScaleOn",
    "Score",
    "Selection",
    "SharedExpertSpec",
    "SharedGate",
    "WeightSource",
    "restore",
]
