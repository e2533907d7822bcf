"""Build the ggml peer of bench/cpu.py into a folder of your choice.

    python bench/ggml/build.py FOLDER
    python bench/cpu.py --ggml FOLDER ...

The sources are those that the sdist of llama-cpp-python carries (llama.cpp's vendored ggml);
only the CPU backend is built, for this machine, in release mode. Needs a C++ compiler, and
cmake and ninja of the system or of PyPI (`pip install cmake ninja`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

SDIST = "llama-cpp-python==0.3.36"
HERE = Path(__file__).resolve().parent


def fetch(folder: Path) -> Path:
    """The folder of ggml's sources, downloaded unless it is there."""
    source = folder / "source"
    if not (source / "CMakeLists.txt").exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        only = ["--no-binary", "llama-cpp-python", SDIST]
        subprocess.run([*pip, *only, "-d", str(folder)], check=True)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            part = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/ggml/"
            wanted = [m for m in tar.getmembers() if m.name.startswith(part)]
            for member in wanted:
                member.name = member.name.removeprefix(part)
            tar.extractall(source, wanted, filter="data")
    return source


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_relative_to(HERE.parents[1]):
        print("the folder must lie outside of the repository", file=sys.stderr)
        return 2
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            print(f"{tool} is missing: pip install {tool}", file=sys.stderr)
            return 2
    source, build = fetch(folder), folder / "build"
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DGGML_SOURCE={source}"]
    subprocess.run(["cmake", "-G", "Ninja", "-S", HERE, "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "moec_ggml"], check=True)
    print(build / "libmoec_ggml.so")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
