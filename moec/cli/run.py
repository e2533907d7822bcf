"""`moec run`: one layer of an artifact on tensors in .npy files.

bfloat16 has no .npy form: two-byte voids, which is how NumPy saves it, are read as bfloat16,
and bfloat16 results are written as float32, which holds every value of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import runtime
from ..artifact import disk
from ..errors import CheckFailed, InputError, UsageError
from ..runtime import Block
from .console import Console

Array = np.ndarray[Any, np.dtype[Any]]
_BF16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"float32": np.dtype("f4"), "float16": np.dtype("f2"), "bfloat16": _BF16}
# rtol and atol by the model's dtype: some roundings of values around 1.
_TOLERANCES = {"float32": (1e-4, 1e-5), "float16": (1e-2, 2e-3), "bfloat16": (3e-2, 1e-2)}
_NAMES = {"moe": ("y",), "experts": ("y",), "route": ("topk_ids", "topk_weights")}


def run(args: argparse.Namespace, console: Console) -> int:
    """Run, save, compare and describe; CheckFailed when --expect differs."""
    _check_arguments(args)
    console.progress("loading")
    model = runtime.load(
        args.artifact, args.device, checkpoint=args.checkpoint, threads=args.threads
    )
    block = model[args.layer]
    inputs = _read_inputs(args, block)
    console.progress("running")
    start = time.perf_counter()
    results = _call(args, block, inputs)
    elapsed = time.perf_counter() - start
    facts: dict[str, Any] = {
        "layer": args.layer,
        "function": args.function,
        "target": model.target,
        "threads": model.threads,
        "milliseconds": round(elapsed * 1e3, 3),
        "results": {name: _describe(array) for name, array in results.items()},
    }
    if args.out:
        _save(Path(args.out), results)
    failure = _compare(args, block, results, facts) if args.expect else None
    if args.json:
        console.json(facts)
    else:
        _print(facts, console)
    if failure:
        raise failure
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    routed = args.function == "experts"
    for flag, value in (("--ids", args.ids), ("--topk-weights", args.topk_weights)):
        if routed != (value is not None):
            verb = "needs" if routed else "takes no"
            raise UsageError(
                f"--function {args.function} {verb} {flag}",
                where=flag,
                hint="--function experts --ids IDS.npy --topk-weights W.npy",
            )
    suffix = ".npz" if args.function == "route" else ".npy"
    for flag, value in (("--out", args.out), ("--expect", args.expect)):
        if value is not None and Path(value).suffix != suffix:
            raise UsageError(f"{value} is not named *{suffix}", where=flag, need=f"*{suffix}")


def _read_inputs(args: argparse.Namespace, block: Block) -> list[Array]:
    wanted = [(args.input, _DTYPES[block.spec.dtype])]
    if args.function == "experts":
        wanted += [(args.ids, np.dtype("i4")), (args.topk_weights, np.dtype("f4"))]
    arrays = []
    for path, dtype in wanted:
        array = read(path)
        if args.cast and array.dtype != dtype:
            array = cast(array, dtype, path)
        elif array.dtype != dtype and dtype.kind != "i":
            raise InputError(
                f"{path} holds {array.dtype.name}",
                where=path,
                need=f"{dtype.name} {list(array.shape)}",
                hint="--cast converts it",
            )
        arrays.append(np.ascontiguousarray(array))
    return arrays


def _call(args: argparse.Namespace, block: Block, inputs: list[Array]) -> dict[str, Array]:
    x = inputs[0]
    if args.function == "route":
        results = block.route(x, args.schedule)
    elif args.function == "experts":
        results = block.experts(x, inputs[1], inputs[2], schedule=args.schedule)
    else:
        results = block(x, schedule=args.schedule)
    names = _NAMES[args.function]
    return dict(zip(names, results if len(names) > 1 else (results,), strict=True))


def read(path: str) -> Array:
    """The array in a .npy file, two-byte voids as bfloat16; InputError if it is none."""
    try:
        # Opened here, because numpy leaves a file open that only looks like a zip archive.
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputError("there is no such file", where=path, need="a .npy file") from None
    except Exception as error:  # numpy.load raises a dozen kinds for damaged files
        raise InputError(
            f"this is no .npy file: {type(error).__name__} {error}".splitlines()[0],
            where=path,
            need="an array saved by numpy.save",
        ) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError("this is an .npz file", where=path, need="a .npy file with one array")
    return array.view(_BF16) if array.dtype == np.dtype("V2") else array


def cast(array: Array, dtype: np.dtype[Any], path: str) -> Array:
    """`array` as `dtype`; InputError when numbers would not survive the kind of conversion."""
    floats = array.dtype.kind == "f" or array.dtype == _BF16
    whole = array.dtype.kind in "iu"
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        fits = whole and (
            not array.size or (array.min() >= limits.min and array.max() <= limits.max)
        )
    else:
        fits = floats or whole
    if not fits:
        raise InputError(
            f"{array.dtype.name} cannot be cast to {dtype.name}", where=path, need=dtype.name
        )
    return array.astype(dtype)


def _save(path: Path, results: dict[str, Array]) -> None:
    plain = {name: _savable(array) for name, array in results.items()}
    with disk.errors(path):
        try:
            with open(path, "wb") as file:
                if path.suffix == ".npz":
                    np.savez(file, **plain)  # type: ignore[arg-type]
                else:
                    np.save(file, plain["y"], allow_pickle=False)
        except OSError:
            path.unlink(missing_ok=True)  # half a file is worse than none
            raise


def _savable(array: Array) -> Array:
    return array.astype("f4") if array.dtype == _BF16 else array


def _describe(array: Array) -> dict[str, Any]:
    facts: dict[str, Any] = {"shape": list(array.shape), "dtype": array.dtype.name}
    if array.size:
        wide = array.astype("f8")
        facts["min"], facts["max"] = float(wide.min()), float(wide.max())
        facts["finite"] = bool(np.isfinite(wide).all())
    return facts


def _compare(
    args: argparse.Namespace, block: Block, results: dict[str, Array], facts: dict[str, Any]
) -> CheckFailed | None:
    """Put differences into `facts`; the failure if a result is not as expected."""
    rtol, atol = _TOLERANCES[block.spec.dtype]
    rtol = rtol if args.rtol is None else args.rtol
    atol = atol if args.atol is None else args.atol
    expected = _read_expected(args.expect, tuple(results))
    failure = None
    for name, array in results.items():
        want, got = expected[name], array.astype("f8")
        if want.shape != got.shape:
            raise InputError(
                f"expected {name} has shape {list(want.shape)}",
                where=args.expect,
                need=f"{list(got.shape)}",
            )
        difference = np.abs(got - want.astype("f8"))
        bad = ~(difference <= atol + rtol * np.abs(want.astype("f8")))  # NaN is bad
        norm = float(np.linalg.norm(want.astype("f8")))
        facts["results"][name]["max_difference"] = float(difference.max(initial=0.0))
        facts["results"][name]["relative_error"] = (
            float(np.linalg.norm(difference)) / norm if norm else float(difference.max(initial=0.0))
        )
        facts["results"][name]["as_expected"] = not bad.any()
        if bad.any() and failure is None:
            place = np.unravel_index(int(np.argmax(bad)), bad.shape)
            at = [int(i) for i in place]
            failure = CheckFailed(
                f"{name} differs from what was expected in {int(bad.sum())} of {bad.size} values",
                where=f"{args.expect}, first at {at}: got {got[place]:.7g}, "
                f"expected {float(want[place]):.7g}",
                need=f"|{name} - expected| <= {atol:g} + {rtol:g} * |expected|",
                hint="--rtol and --atol set the tolerance",
            )
    return failure


def _read_expected(path: str, names: tuple[str, ...]) -> dict[str, Array]:
    if names == ("y",):
        return {"y": read(path)}
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except Exception as error:
        raise InputError(
            f"this is no .npz file with {' and '.join(names)}: {error}".splitlines()[0], where=path
        ) from None


def _print(facts: dict[str, Any], console: Console) -> None:
    console.data(
        f"layer {facts['layer']} {facts['function']} on {facts['target']}, "
        f"{facts['threads']} threads, {facts['milliseconds']} ms (first call)"
    )
    for name, result in facts["results"].items():
        text = f"{name} {result['shape']} {result['dtype']}"
        if "min" in result:
            text += f" in [{result['min']:.6g}, {result['max']:.6g}]"
            text += "" if result["finite"] else ", NOT FINITE"
        if "relative_error" in result:
            verdict = "as expected" if result["as_expected"] else "NOT as expected"
            text += f", {verdict}: relative error {result['relative_error']:.3g}"
            text += f", largest difference {result['max_difference']:.3g}"
        console.data(text)
