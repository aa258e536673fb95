"""Build and load the extension with its CUDA kernels compiled as C++ for the host."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from zlib import crc32

import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++")))


def build(*options: str) -> Path:
    """Build the emulation incrementally with CMake ``options``; return the path of the module.

    Builds are cached in build/, one per Python and options. A file lock serializes the workers of pytest-xdist. Skips
    the test if there is no compiler.
    """
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler here")
    pybind11 = pytest.importorskip("pybind11")
    key = crc32(repr((sys.executable, sys.version, options)).encode())
    folder = ROOT / "build" / f"emulated-{key:08x}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        "-DBAGEL_RT_EMULATE=ON", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}", *options,
    ]  # fmt: skip
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(folder)]):
            done = subprocess.run(
                command, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert done.returncode == 0, done.stdout
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(path: Path):
    """Load the module that :func:`build` returned, next to the installed one."""
    spec = spec_from_file_location("emulated._C", path, loader=ExtensionFileLoader("emulated._C", str(path)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
