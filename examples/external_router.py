"""Route with code of your own: ids of experts held elsewhere are -1, repeated ids add up."""

import tempfile

import numpy as np
from compile_and_run import H, K, write_checkpoint

import moec

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        moec.compile(folder, out=f"{folder}/tiny.moec")
        block = moec.load(f"{folder}/tiny.moec")[0]
        x = np.random.default_rng(1).standard_normal((4, H)).astype(np.float32)
        ids, weights = block.route(x)
        y = block.experts(x, ids, weights)
        print("own router as the block's:", np.array_equal(y, block(x)))

        # Expert parallelism: this machine holds experts 0 to 3, another one holds 4 to 7.
        here = block.experts(x, np.where(ids < 4, ids, -1), weights)
        there = block.experts(x, np.where(ids >= 4, ids, -1), weights)
        print("two halves add up to the whole:", np.allclose(here + there, y, atol=1e-6))

        # The same expert twice with half the weight each is that expert once.
        first = ids[:, :1]
        twice = block.experts(x, np.hstack([first, first]), np.full((4, K), 0.5, np.float32))
        once = block.experts(x, np.hstack([first, first * 0 - 1]), np.ones((4, K), np.float32))
        print("repeated ids add up:", np.allclose(twice, once, atol=1e-6))

        try:
            block.experts(x, np.full_like(ids, 99), weights, check_ids=True)
        except moec.MoecError as error:
            print(error)
