"""Wheels and installs from a clean tree, with and without a C++ compiler, and the Python version of the sources."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from email import message_from_string
from importlib.metadata import distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import numpy as np
import pytest

import bagel_rt
from bagel_rt.runtime import plan

ROOT = Path(__file__).resolve().parents[1]
BUILD_INPUTS = (
    "bagel_rt", "kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md",
    "CHANGELOG.md", "CITATION.cff", "LICENSE",
)  # fmt: skip
HAS_NVCC = shutil.which("nvcc") is not None and os.environ.get("BAGEL_RT_CUDA") != "0"
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++")))


def copy_sources(folder: Path) -> Path:
    """Copy the build inputs, without outputs of earlier builds."""
    folder.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            outputs = shutil.ignore_patterns("__pycache__", "*.so", "_C.log")
            shutil.copytree(ROOT / name, folder / name, ignore=outputs, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


# Runs a command on a terminal of its own and copies what it shows there.
ON_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def pip(command: str, tree: Path, *options: str, on_terminal: bool = False, **environment: str) -> str:
    """Run pip on the tree, offline and with the installed packages only, and return its output.

    The output of the build is part of it (-v), unless pip runs on a terminal.
    """
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--check-build-dependencies", *options)
    python = [sys.executable, "-c", ON_TERMINAL, sys.executable] if on_terminal else [sys.executable]
    done = subprocess.run(
        [*python, "-m", "pip", command, *([] if on_terminal else ["-v"]), *options, str(tree)],
        env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_backend(tree: Path, call: str) -> str:
    """Call a hook of the build backend, as pip does, and return what it prints last."""
    command = [sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.{call})"]
    done = subprocess.run(
        command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    name = run_backend(copy_sources(folder / "tree"), f"build_sdist({str(folder)!r})")
    shutil.unpack_archive(folder / name, folder)
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, source_distribution) -> ZipFile:
    """The wheel that pip builds of the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    architecture = {"BAGEL_RT_CUDA_ARCHITECTURES": "90a-real"}  # one, to save compile time
    pip("wheel", source_distribution, "--wheel-dir", str(folder), **architecture)
    (path,) = folder.glob("bagel_rt-*.whl")
    with ZipFile(path) as archive:
        yield archive


def modules_and_data() -> set[str]:
    """The files of an installed package, but for the compiled extension."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bagel_rt").rglob("*.py")}
    files |= {f"bagel_rt/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "bagel_rt/assets").rglob("*") if path.is_file()}
    assert {"bagel_rt/runtime/plan.py", "bagel_rt/kernels/__init__.py", "bagel_rt/models/bagel/__init__.py"} <= files
    assert {Path(name).suffix for name in files} >= {".py", ".json", ".safetensors"}
    return files | {"bagel_rt/py.typed", "bagel_rt/kernels/configs.json"}


@pytest.mark.slow
def test_source_distribution_contains_what_a_build_needs_and_no_tests(source_distribution):
    found = {path.relative_to(source_distribution).as_posix() for path in source_distribution.rglob("*")}
    found = {name for name in found if (source_distribution / name).is_file() and ".egg-info/" not in name}
    want = {name.replace("bagel_rt/kernels/", "kernels/") for name in modules_and_data()}
    want |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    want |= {name for name in BUILD_INPUTS if (ROOT / name).is_file()}
    assert found == want | {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_wheel_contains_every_module_and_asset_and_nothing_else(wheel):
    module = {f"bagel_rt/_C{sysconfig.get_config_var('EXT_SUFFIX')}" if HAS_COMPILER else "bagel_rt/_C.log"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == modules_and_data() | module


@pytest.mark.slow
def test_wheel_metadata(wheel):
    read = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_string(read["METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("bagel_rt", bagel_rt.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert 'triton<3.10,>=3.6; platform_system == "Linux"' in needed
    assert "torch<2.16,>=2.11" in needed
    assert not any(requirement.startswith("pybind11") for requirement in needed), "only a build needs pybind11"
    assert "bagel-rt = bagel_rt.cli:app" in read["entry_points.txt"]
    assert "Apache License" in read["LICENSE"]


def installed(site: Path, folder: Path, expression: str) -> str:
    """Evaluate an expression in an installation, where ``e`` is bagel_rt.kernels.extension."""
    # -S: without site-packages, so that an editable install of this tree cannot supply a missing module.
    paths = os.pathsep.join([str(site), str(Path(np.__file__).parents[1])])
    script = "from bagel_rt.runtime import plan; import json, bagel_rt.kernels.extension as e\n"
    script += f"print(json.dumps({expression}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths, "BAGEL_RT_EXTENSION": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_embedded_model_runs_from_the_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(np.__file__).parents[1])])
    script = "import bagel_rt.cli; print(bagel_rt.__file__); bagel_rt.cli.app()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, "generate", "a red circle", "-o", "out.png", "--num-timesteps", "3"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(tmp_path / "site/bagel_rt/__init__.py")
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_extension_has_cuda_kernels_if_nvcc_is_available(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    has_cuda, emulated, error = installed(
        tmp_path / "site", tmp_path, "[e.EXTENSION.has_cuda, e.EXTENSION.emulated, e.cuda_error()]"
    )
    assert (has_cuda, emulated) == (HAS_NVCC, False)
    assert error == ("" if HAS_NVCC else "it was built without a CUDA compiler")


OLD, NEW = "sm_80\nsm_86\nsm_89\nsm_90\n", "sm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_103\nsm_120\nsm_121\n"


@pytest.fixture
def build(monkeypatch) -> ModuleType:
    """setup.py as a module, which builds nothing."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("BAGEL_RT_CUDA_ARCHITECTURES", raising=False)
    spec = spec_from_file_location("bagel_rt_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "gpus, known, requested, architectures",
    [
        pytest.param("", NEW, "", "90a-real;80-virtual", id="no-gpu"),
        pytest.param("", NEW, "all", "80-real;90a-real;100-real;120-real;120-virtual", id="all"),
        pytest.param("8.0\n", OLD, "all", "80-real;90a-real;90-virtual", id="all-of-an-older-compiler"),
        pytest.param("9.0\n9.0\n", NEW, "", "90a-real", id="hopper"),
        pytest.param("8.6\n8.9\n7.5\n", OLD, "", "86-real;89-real", id="several-gpus"),
        pytest.param("8.0\n12.0\n", OLD, "", "80-real;90-virtual", id="a-gpu-newer-than-the-compiler"),
        pytest.param("7.5\n", NEW, "", "", id="only-older-gpus"),
        pytest.param("9.0\n", "", "", "90a-real", id="a-compiler-that-does-not-say"),
        pytest.param("9.0\n", NEW, "75", "75", id="a-list-is-passed-to-cmake"),
    ],
)
def test_build_targets(build, monkeypatch, gpus, known, requested, architectures):
    monkeypatch.setattr(build, "output_of", lambda command, *_: gpus if command == "nvidia-smi" else known)
    monkeypatch.setenv("BAGEL_RT_CUDA_ARCHITECTURES", requested)
    assert build.cuda_architectures("nvcc") == architectures


def test_a_checkout_without_symbolic_links_has_the_same_packages(tmp_path):
    script = "import setuptools; setuptools.setup = lambda packages, **_: print(*sorted(packages)); import setup"

    def packages(tree: Path) -> list[str]:
        return subprocess.check_output([sys.executable, "-c", script], cwd=tree, text=True).split()

    tree = copy_sources(tmp_path / "tree")
    link = tree / "bagel_rt/kernels"
    want = packages(tree)
    assert link.is_symlink() and {"bagel_rt", "bagel_rt.kernels"} < set(want) and "kernels" not in want
    link.unlink()
    link.write_text("../kernels")  # what git writes on Windows
    assert packages(tree) == want
    command = [sys.executable, "-c", "import bagel_rt.kernels.norm as norm; print(norm.__file__)"]
    found = subprocess.check_output(command, cwd=tree, env=os.environ | {"PYTHONPATH": ""}, text=True)
    assert Path(found.strip()) == tree / "kernels/norm.py"


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """A C++ compiler that records the sources it compiles in `compiled`, next to it."""
    path = tmp_path / "c++"
    real = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))))
    path.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) echo "$*" >> {tmp_path}/compiled ;; esac\nexec {real} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("BAGEL_RT_CUDA", "0")
    return path


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_build_key_changes_with_sources_flags_and_compilers(build, compiler, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "CMakeLists.txt").touch()
    monkeypatch.setattr(build, "ROOT", tree)
    keys = [build.build_key((), None)]

    def key_changed(options=()) -> bool:
        keys.append(build.build_key(options, None))
        return None not in keys and len(set(keys)) == len(keys)

    os.utime(tree / "csrc/plan.h")
    monkeypatch.setenv("PATH", "/nonexistent", prepend=os.pathsep)  # as in pip's build environment
    assert build.build_key((), None) == keys[0], "neither dates nor temporary folders matter"
    (tree / "csrc/plan.h").write_text("")
    assert key_changed()
    (tree / "csrc/new.h").touch()
    assert key_changed()
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert key_changed()
    assert key_changed(("-DCMAKE_CUDA_ARCHITECTURES=90a-real",))
    compiler.write_text(compiler.read_text() + "# another release\n")
    assert key_changed()
    monkeypatch.setattr(build.pybind11, "__version__", "0")
    assert key_changed()
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build.build_key((), None) is None, "an unknown compiler may have changed"


def build_editable(tree: Path) -> Path:
    """Build the tree as `pip install -e` does, and return the path of the module, which may be missing."""
    run_backend(tree, f"build_editable({str(tree.parent)!r})")
    return tree / "bagel_rt" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_unchanged_extension_is_not_compiled_again_and_a_failed_build_leaves_none(compiler, tmp_path):
    tree = copy_sources(tmp_path / "tree")
    (tree / "csrc/module.cpp").write_text("#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, module) {}\n")
    (tree / "csrc/plan.cpp").write_text("")
    compiled = tmp_path / "compiled"

    first = build_editable(tree).read_bytes()
    assert "csrc/module.cpp" in compiled.read_text()
    compiled.unlink()
    build_editable(tree).unlink()
    assert build_editable(tree).read_bytes() == first and not compiled.exists()

    plan = tree / "csrc/plan.cpp"
    plan.write_text("int unused;")
    build_editable(tree)
    assert "csrc/plan.cpp" in compiled.read_text()

    plan.write_text("broken")
    assert not build_editable(tree).exists(), "a module of older sources"
    assert "not built (requires a C++17 compiler)" in (tree / "bagel_rt/_C.log").read_text()
    plan.write_text("int unused;")
    assert build_editable(tree).exists() and not (tree / "bagel_rt/_C.log").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_install_with_a_broken_cuda_compiler_keeps_the_planner_and_the_error(tmp_path):
    tree, site, broken = copy_sources(tmp_path / "tree"), tmp_path / "site", tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 1\n")
    broken.chmod(0o755)
    environment = {"CUDACXX": str(broken), "BAGEL_RT_CUDA_ARCHITECTURES": "90a-real", "BAGEL_RT_CUDA": ""}
    shown = pip("install", tree, "--target", str(site), on_terminal=True, **environment)
    assert f"bagel_rt: compiling CUDA kernels with {broken} for 90a-real\n" in shown
    assert "the CUDA kernels did not build. `bagel-rt info` shows why" in shown
    assert "bagel_rt: compiling the C++ planner\n" in shown and "csrc/plan.cpp" in shown
    has_cuda, error, planned = installed(
        site, tmp_path, "[e.EXTENSION.has_cuda, e.cuda_error(), len(plan.build_plan([]).order)]"
    )
    assert not has_cuda and planned == 0
    assert error.startswith(f"the CUDA kernels did not build with {broken} for 90a-real: ")


@pytest.mark.slow
def test_install_without_a_compiler_works_and_reports_the_reason(tmp_path):
    tree, site = copy_sources(tmp_path / "tree"), tmp_path / "site"
    environment = {"CXX": "/nonexistent/c++", "PATH": sysconfig.get_path("scripts"), "BAGEL_RT_CUDA": "0"}
    output = pip("install", tree, "--target", str(site), **environment)
    assert "Installing without it. NumPy builds attention plans" in output
    assert not list(site.rglob("_C*.so"))

    path, missing, error = installed(site, tmp_path, "[plan.__file__, plan.EXTENSION, plan.EXTENSION_ERROR]")
    assert (path, missing) == (str(site / "bagel_rt/runtime/plan.py"), None)
    assert error.startswith("not built (requires a C++17 compiler): ") and "/nonexistent/c++" in error
    assert installed(site, tmp_path, "e.cuda_error()") == error.strip()


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
@pytest.mark.skipif(os.environ.get("BAGEL_RT_EXTENSION") == "0", reason="disabled by BAGEL_RT_EXTENSION=0")
@pytest.mark.skipif(not list(distributions(name="bagel_rt")), reason="a checkout that was not installed")
def test_extension_is_installed():
    assert plan.EXTENSION is not None, plan.EXTENSION_ERROR


def test_sources_are_python_3_10_and_import_kernels_by_package():
    folders = ("bagel_rt", "kernels", "benchmarks", "tests")
    for path in [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert "kernels" not in [name.split(".")[0] for name in names], f"{path} must import bagel_rt.kernels"
