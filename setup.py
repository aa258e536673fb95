"""Packages, and the optional C++ extension bagel_rt._C. Everything else is in pyproject.toml."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds the extension with CMake. Where that fails the install goes on without it.

    The reason is then printed, and kept in _C.log where the module would be (``bagel-rt info`` shows it).
    """

    failure = ""

    def run(self):
        super().run()
        for extension in self.extensions:
            module = Path(self.get_ext_fullpath(extension.name))  # an editable install's is in the source tree
            log = module.with_name("_C.log")
            log.unlink(missing_ok=True)
            if self.failure:
                module.unlink(missing_ok=True)  # from an earlier build, of other sources
                log.write_text(self.failure)

    def build_extension(self, extension):
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # cmake and ninja are build requirements: in a virtual environment that is not activated, its scripts.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        try:
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
        except (OSError, subprocess.CalledProcessError) as error:
            self.failure = f"not built (it needs a C++17 compiler): {getattr(error, 'output', error)}"
            raise CompileError(f"{self.failure}\nInstalling without it: numpy makes the plans, slower.") from error


setup(
    packages=find_packages(include=["bagel_rt", "bagel_rt.*"])
    + [f"bagel_rt.{name}" for name in find_packages(include=["kernels", "kernels.*"])],
    package_dir={"bagel_rt.kernels": "kernels"},
    ext_modules=[
        Extension(
            "bagel_rt._C",
            sources=["CMakeLists.txt", "csrc/module.cpp", "csrc/plan.cpp"],
            depends=["csrc/plan.h"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
