"""Packages, and the optional compiled extension bagel_rt._C. Everything else is in pyproject.toml.

Environment variables of the build:

    BAGEL_RT_CUDA=0                  leave the CUDA kernels out, though there is a compiler for them
    BAGEL_RT_CUDA_ARCHITECTURES      GPUs to compile for, as CMake names them, e.g. "90a-real"; by default those that
                                     nvidia-smi reports, and where it reports none, all that the compiler knows;
                                     for newer ones than it knows, PTX
    CUDACXX, CUDA_HOME               where nvcc is, if not on PATH
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    if named := os.environ.get("CUDACXX"):
        return named
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next(filter(None, map(shutil.which, places)), None)


def output_of(*command: str) -> str:
    """What a command prints; nothing if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cuda_architectures(nvcc: str) -> str:
    """The GPUs to compile for; empty if those of this machine are all older than sm_80."""
    if named := os.environ.get("BAGEL_RT_CUDA_ARCHITECTURES"):
        return named
    known = sorted(map(int, re.findall(r"^sm_(\d+)$", output_of(nvcc, "--list-gpu-code"), re.MULTILINE))) or [80, 90]
    reported = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    here = {10 * int(major) + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", reported, re.MULTILINE)}
    # Without a GPU for all there are: sm_86 and sm_89 run the code of sm_80, sm_103 that of sm_100, sm_121 of sm_120.
    wanted = {number for number in here if number >= 80} if here else {80, 90, 100, 120}
    code = [f"{number}a-real" if number == 90 else f"{number}-real" for number in sorted(wanted & set(known))]
    if not here or wanted - set(known):  # newer GPUs: their driver compiles PTX when it first loads a kernel
        code.append(f"{max(number for number in known if number <= max(wanted))}-virtual")
    return ";".join(code)


class CMakeBuild(build_ext):
    """Builds the extension with CMake. Where that fails the install goes on without it, or without its CUDA kernels.

    The reason is then printed, and kept in _C.log beside the module or where it would be (``bagel-rt info`` shows it).
    """

    failure = ""

    def run(self):
        super().run()
        for extension in self.extensions:
            module = Path(self.get_ext_fullpath(extension.name))  # an editable install's is in the source tree
            log = module.with_name("_C.log")
            log.unlink(missing_ok=True)
            if self.failure:
                log.write_text(self.failure)

    def build_extension(self, extension):
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        module.unlink(missing_ok=True)  # from an earlier build, of other sources
        nvcc = None if os.environ.get("BAGEL_RT_CUDA") == "0" else find_nvcc()
        architectures = cuda_architectures(nvcc) if nvcc else ""
        if nvcc and not architectures:
            self.failure = "built without CUDA kernels, as all GPUs here are older than sm_80"
        if architectures:
            compiler = f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"
            try:
                return self.cmake(module, "-DBAGEL_RT_CUDA=ON", *compiler)
            except (OSError, subprocess.CalledProcessError) as error:
                what = f"with {nvcc} for {architectures}"
                self.failure = f"the CUDA kernels did not build {what}: {getattr(error, 'output', error)}"
                print(f"{self.failure}\nInstalling without them: Triton decodes text, slower.", flush=True)
        try:
            self.cmake(module)
        except (OSError, subprocess.CalledProcessError) as error:
            self.failure = f"not built (it needs a C++17 compiler): {getattr(error, 'output', error)}"
            raise CompileError(f"{self.failure}\nInstalling without it: numpy makes the plans, slower.") from error

    def cmake(self, module, *options):
        """Configure and build the module; raises OSError or CalledProcessError, with what was printed."""
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
        ]  # fmt: skip
        # cmake and ninja are build requirements: in a virtual environment that is not activated, its scripts.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(
                command,
                env=os.environ | {"PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=True,
            )
            print(done.stdout, flush=True)


def sources(*patterns: str) -> list[str]:
    """Files of the repository, relative to it."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


setup(
    packages=find_packages(include=["bagel_rt", "bagel_rt.*"])
    + [f"bagel_rt.{name}" for name in find_packages(include=["kernels", "kernels.*"])],
    package_dir={"bagel_rt.kernels": "kernels"},
    ext_modules=[
        Extension(
            "bagel_rt._C",
            sources=["CMakeLists.txt", *sources("csrc/*.cpp", "csrc/*.cu")],
            depends=sources("csrc/*.h"),
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
