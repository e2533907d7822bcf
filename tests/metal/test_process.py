"""An artifact for Metal in a process of its own, with and without a device."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import moec
from tests import models
from tests.conftest import Saved
from tests.metal.conftest import Get

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import hashlib, sys
import ml_dtypes, numpy as np
import moec
from tools.metal_emulator import install
install()
model = moec.load(sys.argv[1], device="metal:0")
x = np.random.default_rng(0).normal(size=(7, int(sys.argv[2]))).astype(ml_dtypes.bfloat16)
print(hashlib.sha256(model[0](x).tobytes()).hexdigest())
"""
REFUSED = """
import sys
import moec
try:
    moec.load(sys.argv[1], device="metal:0")
except moec.MoecError as error:
    print(type(error).__name__, error)
"""


def in_process(code: str, *args: str) -> str:
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_process_gives_the_same_bytes(compiled: Get) -> None:
    made = compiled("mixtral", "a", "bfloat16")
    width = made.model.config.hidden_size
    x = np.random.default_rng(0).normal(size=(7, width)).astype(ml_dtypes.bfloat16)
    here = hashlib.sha256(made.loaded[0](x).tobytes()).hexdigest()
    assert in_process(RUN, str(made.path), str(width)).strip() == here


def test_without_a_device_the_artifact_is_refused(compiled: Get) -> None:
    said = in_process(REFUSED, str(compiled("mixtral", "a", "bfloat16").path))
    assert "TargetError" in said and "no device metal:0" in said


def test_weights_left_in_the_checkpoint(saved: Saved, compiled: Get, tmp_path: Path) -> None:
    model, checkpoint = saved("mixtral", "a", "bfloat16")
    out = tmp_path / "reference.moec"
    moec.compile(checkpoint, target="metal:emulated", out=out, weights="reference")
    loaded = moec.load(out, device="metal:0", checkpoint=checkpoint)
    x = np.ones((3, model.config.hidden_size), ml_dtypes.bfloat16)
    layer = models.moe_layers(model)[0]
    packed = compiled("mixtral", "a", "bfloat16").loaded[layer](x)
    assert (loaded[layer](x) == packed).all()
