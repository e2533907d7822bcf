"""torch in, torch out: no copies, results into a tensor of yours, and errors for gradients."""

import tempfile

import torch
from compile_and_run import H, write_checkpoint

import moec

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        moec.compile(folder, out=f"{folder}/tiny.moec")
        block = moec.load(f"{folder}/tiny.moec")[0]
        x = torch.randn(3, H, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            y = block(x)
            print(type(y).__name__, tuple(y.shape), y.dtype)

            out = torch.empty(2, 3, H)
            same = block(x, out=out[1])  # written in place, wherever a contiguous tensor lies
            print("in place:", same.data_ptr() == out[1].data_ptr(), torch.equal(out[1], y))
            print("rows of a larger tensor:", torch.equal(block(x[1:]), y[1:]))

        try:
            block(torch.nn.Parameter(x))
        except moec.MoecError as error:
            print(error)
