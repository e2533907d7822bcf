"""The Mach-O library of target "metal", made on this machine: signature, symbols, strict link.

The strict link needs the dylibs of the macOS wheels of the pinned packages, which pip fetches.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import moec
from moec import host, target
from moec.artifact import Artifact
from moec.compiler.instruments import Observer
from moec.compiler.lower import lower
from moec.compiler.options import CompileOptions
from moec.errors import TargetError
from moec.schedules import backend, choose
from moec.schedules.metal import codegen, macho, macho_file
from moec.spec import ExpertsSpec, MoESpec, RouterSpec, SharedExpertSpec
from tests.conftest import Saved
from tests.metal.payload import payload

SPEC = MoESpec(
    "bfloat16",
    RouterSpec(6, 2),
    ExpertsSpec(6, 2, 40, 24),
    SharedExpertSpec(32),
)


@pytest.fixture(scope="module")
def artifact(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """gpt_oss compiled for a Mac and for the emulated device."""
    _, checkpoint = saved("gpt_oss", "a", "bfloat16")
    out = tmp_path_factory.mktemp("macho") / "m.moec"
    moec.compile(checkpoint, target=["metal", "metal:emulated"], out=out)
    return Artifact.open(out)


@pytest.fixture(scope="module")
def dylib(artifact: Artifact) -> bytes:
    return artifact.file("lib/metal.dylib").read_bytes()


def module(name: str) -> Any:
    """SPEC compiled for a target, before linking."""
    to = target.resolve(name)
    own = backend("metal")
    observer, schedules = Observer(CompileOptions()), choose(own, (), SPEC, to)
    return codegen.compile_module(
        lower("b0", SPEC, to, own, schedules, observer, None).functions, to
    )


@pytest.fixture(scope="module")
def runtime_dylibs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """libtvm_ffi.dylib and libtvm_runtime.dylib of the pinned macOS wheels."""
    folder = tmp_path_factory.mktemp("wheels")
    pins = [f"{name}=={versions[0]}" for name, versions in host.PINNED.items()]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    options = ["--only-binary=:all:", "--platform", "macosx_11_0_arm64", "--python-version", "3.11"]
    subprocess.run([*command, *options, *pins], check=True)
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name in ("libtvm_ffi.dylib", "libtvm_runtime.dylib"):
                    found.append(Path(archive.extract(name, folder)))
    assert len(found) == 2
    return found


def test_the_artifact_holds_a_signed_dylib_for_macos_13(artifact: Artifact, dylib: bytes) -> None:
    described = artifact.manifest.targets["metal"]
    assert described.library == "lib/metal.dylib" and described.device == "metal"
    assert described.requires == {"os": "macos", "arch": "aarch64", "features": []}
    read = macho_file.read(dylib)
    assert read.kind == 6 and read.minimum_os == "13.0"
    assert read.install_name == "@rpath/metal.dylib"
    assert read.signature == ""
    assert read.libraries == ("/usr/lib/libSystem.B.dylib",)


def test_a_changed_page_breaks_the_signature(dylib: bytes) -> None:
    changed = bytearray(dylib)
    changed[0x4000] ^= 1
    assert "changed after signing" in (macho_file.read(bytes(changed)).signature or "")


def test_symbols(artifact: Artifact, dylib: bytes) -> None:
    symbols = macho_file.read(dylib).symbols
    assert not [s.name for s in symbols if s.weak]
    defined = {s.name for s in symbols if s.defined}
    shapes = artifact.manifest.targets["metal"].shapes
    entries = {v.symbol for s in shapes.values() for f in s.functions.values() for v in f.variants}
    assert {f"___tvm_ffi_{symbol}" for symbol in entries} <= defined
    assert {"___tvm_ffi__library_bin", "___tvm_ffi__library_ctx"} <= defined
    for symbol in symbols:
        known = symbol.name.startswith(macho.RUNTIME_PREFIXES) or symbol.name == "dyld_stub_binder"
        assert symbol.defined or known, symbol.name


def test_weak_definitions_are_what_tvm_emits_and_we_remove(tmp_path: Path) -> None:
    objects = macho.objects(module("metal"), tmp_path)
    weak = [s.name for o in objects for s in macho_file.read(o.read_bytes()).symbols if s.weak]
    assert "___tvm_ffi__library_ctx" in weak
    for file in objects:
        strong = macho_file.without_weak_definitions(file.read_bytes())
        assert not [s for s in macho_file.read(strong).symbols if s.weak]


def test_strict_link_finds_every_symbol_in_the_runtime(
    tmp_path: Path, runtime_dylibs: list[Path]
) -> None:
    objects = macho.objects(module("metal"), tmp_path)
    out = tmp_path / "strict.dylib"
    macho.link(objects, out, against=runtime_dylibs)
    assert macho_file.read(out.read_bytes()).signature == ""
    # The check can fail: without the runtime's dylibs its symbols are missing.
    with pytest.raises(TargetError, match="_TVMFFI"):
        macho.link(objects, tmp_path / "missing.dylib", against=[])


def test_the_mac_gets_the_kernels_that_the_emulator_runs(artifact: Artifact, dylib: bytes) -> None:
    emulated = artifact.manifest.targets["metal-emulated"]
    kernels = {
        f"{kernel}_kernel"
        for function in emulated.shapes["b0"].functions.values()
        for variant in function.variants
        for kernel in variant.ops["kernels"]
    }
    here, there = payload(artifact.file(emulated.library).read_bytes()), payload(dylib)
    assert there == here and set(there) == kernels


def test_equal_input_gives_equal_bytes(saved: Saved, tmp_path: Path, dylib: bytes) -> None:
    _, checkpoint = saved("gpt_oss", "a", "bfloat16")
    moec.compile(checkpoint, target="metal", out=tmp_path / "again.moec")
    assert (tmp_path / "again.moec" / "lib" / "metal.dylib").read_bytes() == dylib


def test_other_files_are_refused() -> None:
    for data in (b"", b"\x7fELF" + bytes(60), struct.pack("<8I", 0xFEEDFACF, 7, 0, 6, 0, 0, 0, 0)):
        with pytest.raises(ValueError, match="Mach-O"):
            macho_file.read(data)
