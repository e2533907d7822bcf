"""What a process that only runs artifacts loads: no compiler and no torch."""

from __future__ import annotations

import pytest

from tests.runtime import fake
from tests.runtime.test_threads import run

USE = """
import sys
import moec.runtime
model = moec.runtime.load(sys.argv[1])
import numpy as np
assert (model[3](np.ones((2, 8), "f4")) == 2).all()
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "libtvm_compiler" not in maps
assert not maps or "libtvm_runtime" in maps
heavy = {"tvm", "tvm_ffi", "torch", "safetensors", "onnx"} & set(sys.modules)
inner = [m for m in sys.modules if m.startswith("moec.") and m.split(".")[1] in
         ("ops", "schedules", "frontend", "compiler", "cli", "target")]
assert not heavy and not inner, (heavy, inner)
"""


def test_no_compiler_is_mapped() -> None:
    run(USE, str(fake.shared()))


def test_torch_is_not_imported_even_for_foreign_tensors() -> None:
    pytest.importorskip("torch")
    run(
        """
        import sys
        import numpy as np, moec.runtime
        class Array:
            def __init__(self, a): self.a = a
            def __dlpack__(self, **k): return self.a.__dlpack__(**k)
            def __dlpack_device__(self): return (1, 0)
            def __array_namespace__(self): return np
        moec.runtime.load(sys.argv[1])[1](Array(np.ones((2, 8), "f4")))
        assert "torch" not in sys.modules
        """,
        str(fake.shared()),
    )


def test_importing_torch_later_works() -> None:
    pytest.importorskip("torch")
    run(
        """
        import sys
        import moec.runtime
        model = moec.runtime.load(sys.argv[1])
        import torch
        assert (model[1](torch.ones(2, 8)) == 2).all()
        import tvm_ffi
        assert (torch.from_dlpack(model[1](tvm_ffi.from_dlpack(torch.ones(2, 8)))) == 2).all()
        """,
        str(fake.shared()),
    )


def test_the_compiler_half_may_share_the_process() -> None:
    run(
        """
        import sys
        import numpy as np
        import tvm
        import moec.runtime
        assert (moec.runtime.load(sys.argv[1])[1](np.ones((2, 8), "f4")) == 2).all()
        """,
        str(fake.shared()),
    )
