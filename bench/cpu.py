"""The experts of layers on the CPU, side by side with peers in one process for each layer.

    python bench/ggml/build.py /tmp/ggml
    python bench/cpu.py --layers qwen3,olmoe,mixtral --dtypes bfloat16,float32 --threads 1,2 \
        --ggml /tmp/ggml --json cpu.json

Every round runs the machine's own loops (reading memory, multiplying in registers) and then
each candidate, in a random order, on the same inputs and the same weights, so that all of them
meet the same state of the machine; for T <= 4 the reads also flush the caches before each call.
Reported: the median, its ratio to the best schedule of moec (above 1: moec is faster), and the
fractions of the read bandwidth and of the arithmetic peak measured in the same rounds (a weight
counts with the bytes of its dtype: moec may read bfloat16 at 1.33 of the bandwidth, as it packs
them into 12 bits). Outputs are compared with moec's before anything is timed.

Peers: transformers' experts (eager, grouped_mm, batched_mm), ggml as llama.cpp calls it, ONNX
Runtime's MoE (float32 only), and OpenVINO (if it is installed) through its GatherMatmul kernels.
All sides have pages of the same kind, and weights in memory of their own (those of a mapped file
are read a tenth to a fifth slower where pages have 4 KB): with `--pages huge` all that malloc and
mmap give may be on transparent huge pages, with `4k` nothing is. The last part is cpu_small.py.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_layers import LAYERS, NUMPY, write_checkpoint
from cpu_peers import NAMES

import moec
from moec import host

_HERE = Path(__file__).resolve().parent
_PR_SET_THP_DISABLE = 41
_HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


def child(folder: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one layer, dtype and number of threads, printed as they come."""
    huge = arguments["pages"] == "huge"
    if not huge:  # inherited by the child
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    command = [sys.executable, str(_HERE / "cpu_cell.py"), str(folder), json.dumps(arguments)]
    threads = {name: str(arguments["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, **(_HUGE if huge else {})}
    rows, last = [], None
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            rows.append(json.loads(line))
            last = show(rows[-1], last)
    if process.returncode:
        raise SystemExit(process.returncode)
    return rows


def show(row: dict[str, Any], last: Any) -> Any:
    """One line of the table; a heading where the cell is another than `last`."""
    cell = tuple(row[k] for k in ("layer", "dtype", "threads", "tokens"))
    if cell[:3] != (last or ())[:3]:
        print(f"\n{row['layer']} {row['dtype']} threads {row['threads']} pages {row['pages']}")
        print(f"{'T':>5}  {'':<24}{'ms':>10}{'ratio':>8}{'read':>7}{'peak':>7}")
    if cell != last:
        print(f"{row['tokens']:>5}  machine: {row['read']:.1f} GB/s, {row['peak']:.0f} GFLOP/s")
    print(
        f"{'':>5}  {row['name']:<24}{row['milliseconds']:>10.2f}{row['ratio']:>8.2f}"
        f"{row['of_read']:>7.2f}{row['of_peak']:>7.2f}",
        flush=True,
    )
    return cell


def small() -> list[dict[str, Any]]:
    """Rows of cpu_small.py."""
    command = [sys.executable, str(_HERE / "cpu_small.py")]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    rows = [json.loads(line) for line in lines.splitlines()]
    print("\nsmall costs, one thread, microseconds")
    for row in rows:
        what = f"E={row['experts']} T={row['tokens']}" if "experts" in row else ""
        print(f"  {row['what']:<8}{what:<14}{row['name']:<26}{row['microseconds']:>9.2f}")
    return rows


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return list(map(int, words(text)))


def chosen(names: list[str], known: Any, what: str) -> list[str]:
    """The names, each of which must be known."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=words, default=["olmoe"], help=", ".join(LAYERS))
    parser.add_argument("--dtypes", type=words, default=["bfloat16"], help=", ".join(NUMPY))
    parser.add_argument("--threads", type=numbers, default=[host.cores()])
    parser.add_argument("--tokens", type=numbers, default=numbers("1,2,4,16,32,128,512,2048"))
    parser.add_argument("--peers", type=words, default=words("eager,grouped_mm,onnxruntime"
                        ",ggml,openvino"), help=", ".join(NAMES))  # fmt: skip
    parser.add_argument("--schedules", type=words, default=words("fused,gather,loop"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each T, about")
    parser.add_argument("--pages", choices=("huge", "4k"), default="huge")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: of the process, for one thread on a busy machine")  # fmt: skip
    parser.add_argument("--ggml", type=Path, help="the folder that bench/ggml/build.py built in")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    chosen(args.layers, LAYERS, "layers")
    chosen(args.dtypes, NUMPY, "dtypes")
    chosen(args.peers, NAMES, "peers")
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("--clock cpu is for --threads 1")
    missing = {"ggml"} if args.ggml is None else set()
    if importlib.util.find_spec("openvino") is None:
        missing.add("openvino")
    for name in sorted(missing & set(args.peers)):
        print(f"without {name}: not built or not installed", file=sys.stderr)
    args.peers = [p for p in args.peers if p not in missing]
    return args


def main() -> int:
    args = parse()
    rows: list[dict[str, Any]] = []
    for layer in args.layers:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_checkpoint(folder, layer, dtype)
                artifact = folder / "layer.moec"
                report = moec.compile(folder, out=artifact, schedules=args.schedules)
                spent = {k: round(v, 2) for k, v in report.seconds.items()}
                print(f"{layer} {dtype} compile: {spent}", file=sys.stderr)
                for threads in args.threads:
                    arguments = {"layer": layer, "dtype": dtype, "threads": threads}
                    for key in ("peers", "tokens", "seconds", "pages", "clock"):
                        arguments[key] = getattr(args, key)
                    arguments["ggml"] = str(args.ggml) if args.ggml else None
                    rows += child(folder, arguments)
    others = small()
    if args.json:
        write_results(args, rows, others)
    return 0


def write_results(
    args: argparse.Namespace, rows: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    packages = ["moec", "apache-tvm", "torch", "transformers", "onnxruntime", "openvino", "numpy"]
    here = host.host()
    document = {
        "machine": {"cpu": here.cpu, "cores": here.cores, "system": platform.platform()},
        "versions": {name: host.installed(name) for name in packages},
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "clock": args.clock,
        "rows": rows,
        "small": others,
    }
    args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
