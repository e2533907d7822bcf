"""Whether code of a target runs on this machine, as the commands print it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import host
from ..errors import MoecError


def reason(requires: Mapping[str, Any]) -> str | None:
    """Why code that needs `requires` (host.missing) does not run here; None if it does.

    Code for a GPU runs here if it does on the first one.
    """
    why = host.missing(requires)
    if why is not None or "gpu" not in requires:
        return why
    from ..runtime import cuda

    try:
        return cuda.missing(str(requires["gpu"]), 0)
    except MoecError as error:
        return error.message.partition(":")[0]  # without what the loader said
