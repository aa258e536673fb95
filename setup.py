"""Packages and the optional compiled extension bagel_rt._C. All other metadata is in pyproject.toml.

Environment variables of the build:

    BAGEL_RT_CUDA=0                  do not build the CUDA kernels
    BAGEL_RT_CUDA_ARCHITECTURES      "all", or a value of CMAKE_CUDA_ARCHITECTURES such as "90a-real". Default: the
                                     GPUs that nvidia-smi reports; if it reports none, sm_90a, and PTX of compute_80
                                     for the others
    CUDACXX, CUDA_HOME               location of nvcc if it is not on PATH

A built extension is kept in build/extension and reused until a source, a compiler or an option changes.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "extension"

# What compilers and CMake read besides their arguments.
COMPILER_VARIABLES = re.compile(
    r"CXX|CXXFLAGS|LDFLAGS|CUDAFLAGS|CUDAHOSTCXX|NVCC_\w+|CMAKE_\w+|CPATH|CPLUS_INCLUDE_PATH|LIBRARY_PATH"
    r"|MACOSX_DEPLOYMENT_TARGET|SDKROOT"
)


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
    requested = os.environ.get("BAGEL_RT_CUDA_ARCHITECTURES", "")
    if requested not in ("", "all"):
        return requested
    listed = re.findall(r"^sm_(\d+)$", output_of(nvcc, "--list-gpu-code"), re.MULTILINE)
    supported = set(map(int, listed)) or {80, 90}
    if requested == "all":  # sm_86 and sm_89 run sm_80 code, sm_103 sm_100 code, sm_121 sm_120 code
        code = supported & {80, 90, 100, 120}
        return _cmake_list(code, ptx=max(code))
    reported = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    installed = {10 * int(major) + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", reported, re.MULTILINE)}
    if not installed:  # one generation only, since each takes as long to compile; the driver compiles PTX for the rest
        return _cmake_list({90}, ptx=80)
    targets = {number for number in installed if number >= 80}
    newer = targets - supported
    return _cmake_list(targets & supported, ptx=max(n for n in supported if n <= max(newer)) if newer else None)


def _cmake_list(code: set[int], ptx: int | None) -> str:
    # 90a is the target with Hopper's architecture-specific instructions.
    targets = [f"{number}a-real" if number == 90 else f"{number}-real" for number in sorted(code)]
    return ";".join([*targets, *([f"{ptx}-virtual"] if ptx else [])])


def show(text: str) -> None:
    """Write a line to the terminal. pip hides the output of builds unless it runs with ``-v``, but not the terminal."""
    try:
        with open("/dev/tty", "w") as terminal:
            if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():  # writing could stop a background job
                terminal.write(f"\r{text}\n")  # over the spinner of pip
    except (AttributeError, OSError):  # no terminal, or Windows
        pass


def identify(command: list[str]) -> str | None:
    """What tells one compiler from another: path, size, date and version. None if it does not state its version."""
    path = shutil.which(command[0])
    version = output_of(*command, "--version")
    if path is None or not version:
        return None
    status = os.stat(path)
    return repr((command, os.path.realpath(path), status.st_size, status.st_mtime_ns, version))


def build_key(options: tuple[str, ...], nvcc: str | None) -> str | None:
    """Hash of everything that the compiled module depends on; None if a compiler cannot be identified.

    Paths in pip's temporary build environment are left out: they differ for every install.
    """
    names = filter(None, map(shutil.which, ("c++", "g++", "clang++")))  # the order of CMake
    compilers = [shlex.split(os.environ.get("CXX", "")) or [next(names, "c++")]]
    if nvcc:
        compilers += [nvcc], [os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN") or "gcc"]
    identities = [identify(compiler) for compiler in compilers]
    if None in identities:
        return None
    variables = sorted(item for item in os.environ.items() if COMPILER_VARIABLES.fullmatch(item[0]))
    files = [(name, (ROOT / name).read_bytes()) for name in sources("setup.py", "CMakeLists.txt", "csrc/*")]
    python = sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include")
    described = repr((options, identities, variables, files, python, pybind11.__version__))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


class CMakeBuild(build_ext):
    """Builds the extension with CMake. If that fails, the install continues without CUDA kernels or without extension.

    The reason is printed and written to _C.log next to the module, where ``bagel-rt info`` reads it.
    """

    failure = ""

    def run(self) -> None:
        """Build the extension, or record why it is missing. No module of an earlier build survives a failure."""
        outputs = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        for module in outputs:  # in the source tree for an editable install, where super() replaces but never removes
            module.unlink(missing_ok=True)
        super().run()
        for module in outputs:
            log = module.with_name("_C.log")
            log.unlink(missing_ok=True)
            if self.failure:
                log.write_text(self.failure)

    def build_extension(self, extension: Extension) -> None:
        """Build with CUDA kernels if there is a compiler for them, else without."""
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        module.unlink(missing_ok=True)
        nvcc = None if os.environ.get("BAGEL_RT_CUDA") == "0" else find_nvcc()
        architectures = cuda_architectures(nvcc) if nvcc else ""
        if nvcc and not architectures:
            self.failure = "built without CUDA kernels: they require sm_80 or newer, and all GPUs here are older"
        if nvcc and architectures:
            options = "-DBAGEL_RT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"
            target = f"with {nvcc} for {architectures}"
            options += (f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",)
            try:
                return self.build(module, f"CUDA kernels {target}", options, nvcc)
            except (OSError, subprocess.CalledProcessError) as error:
                self.failure = f"the CUDA kernels did not build {target}: {getattr(error, 'output', error)}"
                print(f"{self.failure}\nInstalling without them. Triton decodes text, more slowly.", flush=True)
                show("bagel_rt: the CUDA kernels did not build. `bagel-rt info` shows why. Installing without them.")
        try:
            self.build(module, "the C++ planner", (), None)
        except (OSError, subprocess.CalledProcessError) as error:
            self.failure = f"not built (requires a C++17 compiler): {getattr(error, 'output', error)}"
            raise CompileError(
                f"{self.failure}\nInstalling without it. NumPy builds attention plans, more slowly."
            ) from error

    def build(self, module: Path, contents: str, options: tuple[str, ...], nvcc: str | None) -> None:
        """Compile the module, or copy the one that an earlier install compiled from the same inputs."""
        key = build_key(options, nvcc)
        kept = CACHE / f"{key}-{module.name}"
        if key and kept.exists():
            print(f"bagel_rt: {contents}: unchanged, reusing {kept}", flush=True)
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, module)
            return
        print(f"bagel_rt: compiling {contents}", flush=True)
        show(f"\nbagel_rt: compiling {contents}")  # on a line of its own: pip's cursor is behind "Building"
        start = time.monotonic()
        self.cmake(module, *options)
        show(f"bagel_rt: compiled in {time.monotonic() - start:.0f} s")
        if key:
            CACHE.mkdir(parents=True, exist_ok=True)
            for old in CACHE.glob(f"*-{module.name}"):  # one for each Python
                old.unlink(missing_ok=True)
            incomplete = CACHE / f"{os.getpid()}.incomplete"
            shutil.copy(module, incomplete)
            incomplete.replace(kept)

    def cmake(self, module: Path, *options: str) -> None:
        """Configure and build the module. Raises OSError, or CalledProcessError with the output of CMake."""
        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build, ignore_errors=True)  # Ninja would reuse objects of another compiler at the same path
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
        ]  # fmt: skip
        # cmake and ninja are build requirements. Their scripts are not on PATH in an environment that is not activated.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        for command in (configure, ["cmake", "--build", str(build)]):
            lines = []
            with subprocess.Popen(
                command,
                env=os.environ | {"PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                for line in process.stdout:
                    lines.append(line)
                    print(line, end="", flush=True)
                    if line.startswith("["):  # [1/7] Building CUDA object ...
                        show(line.rstrip())
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, "".join(lines))


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
