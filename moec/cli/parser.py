"""The arguments of every verb; nothing heavy is imported to print help."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .. import __version__

_COMMON = "common options"
STAGES = ("graph", "passes", "legalized", "library")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moec: error: {message}\n  try  {self.prog} --help\n")


def build() -> _Parser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="moec",
        description="Compiles the Mixture-of-Experts layers of a checkpoint into artifacts.",
        epilog="Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input, 4 target, 5 check failed, "
        "6 resources, 130 interrupted.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"moec {__version__}",
        help="print the version and exit",
    )
    common = _Parser(add_help=False)
    group = common.add_argument_group(_COMMON)
    group.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    group.add_argument("-v", "--verbose", action="store_true", help="tracebacks and details")
    json = _Parser(add_help=False)
    json.add_argument("--json", action="store_true", help="print data as JSON")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> _Parser:
        help_text = text[0].lower() + text[1:].rstrip(".")
        return verbs.add_parser(name, help=help_text, description=text, parents=[common, json])

    _quickstart(verb("quickstart", "Write a checkpoint, compile it, run it, check and time it."))
    _inspect(verb("inspect", "Describe a checkpoint or an artifact."))
    _compile(verb("compile", "Compile the MoE layers of a checkpoint into an artifact."))
    _verify(verb("verify", "Check every byte of an artifact; no code of it is loaded."))
    _run(verb("run", "Run one layer of an artifact on tensors in .npy files."))
    _selftest(verb("selftest", "Check and time every schedule of a target on this machine."))
    verb("targets", "List targets, what this machine can run and why not, and schedules.")
    verb("env", "Versions and hardware, to paste into a report.")
    return parser


def _quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="PATH", help="use this checkpoint, not a made one")


def _selftest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-t", "--target", default="cpu", metavar="NAME", help="cpu (the default) or metal")
    add("--quick", action="store_true", help="only the small layers, no layer to time")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a model directory or an artifact")
    parser.add_argument("--family", metavar="FILE", help="describe the model family in this file")


def _compile(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="directory with config.json and safetensors")
    add(
        "-t",
        "--target",
        action="append",
        metavar="NAME",
        help="cpu (this machine, the default) or cpu:NAME, see 'moec targets'; repeatable, "
        "weights are packed for the first",
    )
    add("-o", "--out", metavar="DIR", help="the artifact; default: CHECKPOINT's name + .moec")
    add("--layers", metavar="LIST", help="only these layers, as 0-3,7")
    add("--schedule", action="append", metavar="NAME", help="only this schedule (repeatable)")
    add(
        "--weights",
        choices=("pack", "reference"),
        default="pack",
        help="store packed weights (default), or leave them in the checkpoint",
    )
    add("--force", action="store_true", help="replace an existing artifact")
    add("--family", metavar="FILE", help="use the model family in this file")
    add("--allow-nonfinite", action="store_true", help="accept NaN and Inf in weights")
    add("--dry-run", action="store_true", help="say what would be done, write nothing")
    debug = parser.add_argument_group("looking inside")
    debug.add_argument("--dump-ir", metavar="DIR", help="write the IR after every pass to DIR")
    debug.add_argument("--print-ir-after", metavar="PASS", help="print the IR after this pass")
    debug.add_argument("--stop-after", choices=STAGES, help="stop there and print what it gave")
    debug.add_argument("--time-passes", action="store_true", help="print the time of every pass")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="the directory to check")
    parser.add_argument("--digest", metavar="SHA", help="the digest that it must have")


def _run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="the directory that 'moec compile' wrote")
    add("--layer", type=int, required=True, metavar="N", help="the number of the layer")
    add(
        "--function",
        choices=("moe", "experts", "route"),
        default="moe",
        help="what to run: the whole block (default), its experts with ids from you, its router",
    )
    add("--input", required=True, metavar="X.npy", help="x [T, H] in the model's dtype")
    add("--ids", metavar="IDS.npy", help="topk_ids [T, K] int32 or int64, for experts")
    add("--topk-weights", metavar="W.npy", help="topk_weights [T, K] float32, for experts")
    add("--cast", action="store_true", help="convert inputs to the dtypes that are needed")
    add(
        "-o",
        "--out",
        metavar="FILE",
        help="save y as .npy (bfloat16 as float32); for route both results as .npz",
    )
    add("--expect", metavar="FILE", help="compare with this result; exit code 5 if it differs")
    add("--rtol", type=float, metavar="R", help="allowed |y - expected| <= A + R * |expected|")
    add("--atol", type=float, metavar="A", help="(the defaults depend on the model's dtype)")
    add("--schedule", metavar="NAME", help="force a compiled schedule")
    add("--checkpoint", metavar="PATH", help="where the weights are, if not in the artifact")
    add("--device", default="cpu", help="cpu (the default), or metal:0 on a Mac")
    add("--threads", type=int, metavar="N", help="default: TVM_NUM_THREADS, else the cores")
