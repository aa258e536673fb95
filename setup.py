"""Packages and the optional compiled extension bagel_rt._C. All other metadata is in pyproject.toml.

Environment variables of the build:

    BAGEL_RT_CUDA=0                  do not build the CUDA kernels
    BAGEL_RT_CUDA_ARCHITECTURES      value of CMAKE_CUDA_ARCHITECTURES, e.g. "90a-real". Default: the GPUs that
                                     nvidia-smi reports, or all supported ones if it reports none; PTX for GPUs that
                                     the compiler does not support yet
    CUDACXX, CUDA_HOME               location of nvcc if it is not on PATH
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
    """Path of the CUDA compiler, or None."""
    if compiler := os.environ.get("CUDACXX"):
        return compiler
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next(filter(None, map(shutil.which, candidates)), None)


def output_of(*command: str) -> str:
    """Standard output of a command; empty if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cuda_architectures(nvcc: str) -> str:
    """CMAKE_CUDA_ARCHITECTURES for this machine; empty if all its GPUs are older than sm_80."""
    if architectures := os.environ.get("BAGEL_RT_CUDA_ARCHITECTURES"):
        return architectures
    supported = sorted(map(int, re.findall(r"^sm_(\d+)$", output_of(nvcc, "--list-gpu-code"), re.MULTILINE))) or [
        80,
        90,
    ]
    reported = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    installed = {10 * int(major) + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", reported, re.MULTILINE)}
    # Without a GPU, build for all generations: sm_86 and sm_89 run sm_80 code, sm_103 sm_100 code, sm_121 sm_120 code.
    targets = {number for number in installed if number >= 80} if installed else {80, 90, 100, 120}
    # 90a is the target with Hopper's architecture-specific instructions.
    code = [f"{number}a-real" if number == 90 else f"{number}-real" for number in sorted(targets & set(supported))]
    if not installed or targets - set(supported):  # the driver of a newer GPU compiles PTX when a kernel is loaded
        code.append(f"{max(number for number in supported if number <= max(targets))}-virtual")
    return ";".join(code)


class CMakeBuild(build_ext):
    """Builds the extension with CMake. If that fails, the install continues without CUDA kernels or without extension.

    The reason is printed and written to _C.log next to the module, where ``bagel-rt info`` reads it.
    """

    failure = ""

    def run(self):
        super().run()
        for extension in self.extensions:
            module = Path(self.get_ext_fullpath(extension.name))  # in the source tree for an editable install
            log = module.with_name("_C.log")
            log.unlink(missing_ok=True)
            if self.failure:
                log.write_text(self.failure)

    def build_extension(self, extension):
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        module.unlink(missing_ok=True)  # a stale build must not survive a failure
        nvcc = None if os.environ.get("BAGEL_RT_CUDA") == "0" else find_nvcc()
        architectures = cuda_architectures(nvcc) if nvcc else ""
        if nvcc and not architectures:
            self.failure = "built without CUDA kernels: they require sm_80 or newer, and all GPUs here are older"
        if architectures:
            compiler = f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"
            try:
                return self.cmake(module, "-DBAGEL_RT_CUDA=ON", *compiler)
            except (OSError, subprocess.CalledProcessError) as error:
                target = f"with {nvcc} for {architectures}"
                self.failure = f"the CUDA kernels did not build {target}: {getattr(error, 'output', error)}"
                print(f"{self.failure}\nInstalling without them. Triton decodes text, more slowly.", flush=True)
        try:
            self.cmake(module)
        except (OSError, subprocess.CalledProcessError) as error:
            self.failure = f"not built (requires a C++17 compiler): {getattr(error, 'output', error)}"
            raise CompileError(
                f"{self.failure}\nInstalling without it. NumPy builds attention plans, more slowly."
            ) from error

    def cmake(self, module, *options):
        """Configure and build the module. Raises OSError, or CalledProcessError with the output of CMake."""
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
        ]  # fmt: skip
        # cmake and ninja are build requirements. Their scripts are not on PATH in an environment that is not activated.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        for command in (configure, ["cmake", "--build", str(build)]):
            result = subprocess.run(
                command,
                env=os.environ | {"PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=True,
            )
            print(result.stdout, flush=True)


def sources(*patterns: str) -> list[str]:
    """Files that match the patterns, relative to the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


setup(
    # bagel_rt/kernels is a link to kernels/ for type checkers and editors; a checkout on Windows may lack it.
    packages=find_packages(include=["bagel_rt", "bagel_rt.*"], exclude=["bagel_rt.kernels*"])
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
