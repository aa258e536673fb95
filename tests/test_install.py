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
from zipfile import ZipFile

import numpy as np
import pytest

from bagel_rt.runtime import plan

ROOT = Path(__file__).resolve().parents[1]
BUILD_INPUTS = ("bagel_rt", "kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
HAS_NVCC = shutil.which("nvcc") is not None and os.environ.get("BAGEL_RT_CUDA") != "0"
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++")))


def copy_sources(folder: Path) -> Path:
    """Copy the build inputs, without outputs of earlier builds."""
    folder.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_C.log"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def pip(command: str, tree: Path, *options: str, **environment: str) -> str:
    """Run pip on the tree, offline and with the installed packages only, and return its output."""
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--check-build-dependencies", "-v", *options)
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, str(tree)],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    architecture = {"BAGEL_RT_CUDA_ARCHITECTURES": "90a-real"}  # one of four, to save compile time
    pip("wheel", copy_sources(folder / "tree"), "--wheel-dir", str(folder), **architecture)
    (path,) = folder.glob("bagel_rt-*.whl")
    with ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_wheel_contains_every_module_and_asset_and_nothing_else(wheel):
    want = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bagel_rt").rglob("*.py")}
    want |= {f"bagel_rt/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bagel_rt/assets").rglob("*") if path.is_file()}
    assert {"bagel_rt/runtime/plan.py", "bagel_rt/kernels/__init__.py", "bagel_rt/models/bagel/__init__.py"} <= want
    assert {Path(asset).suffix for asset in assets} >= {".json", ".safetensors"}
    assets.add("bagel_rt/kernels/configs.json")
    module = {f"bagel_rt/_C{sysconfig.get_config_var('EXT_SUFFIX')}" if HAS_COMPILER else "bagel_rt/_C.log"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == want | assets | module


@pytest.mark.slow
def test_wheel_metadata(wheel):
    read = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_string(read["METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("bagel_rt", "0.1.0")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert 'triton<3.8,>=3.6; platform_system == "Linux"' in needed
    assert "torch<2.14,>=2.11" in needed
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
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_extension_has_cuda_kernels_if_nvcc_is_available(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    has_cuda, emulated, error = installed(
        tmp_path / "site", tmp_path, "[e.EXTENSION.has_cuda, e.EXTENSION.emulated, e.cuda_error()]"
    )
    assert (has_cuda, emulated) == (HAS_NVCC, False)
    assert error == ("" if HAS_NVCC else "it was built without a CUDA compiler")


OLD, NEW = "sm_80\nsm_86\nsm_89\nsm_90\n", "sm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_103\nsm_120\nsm_121\n"


@pytest.mark.parametrize(
    "gpus, known, architectures",
    [
        pytest.param("", NEW, "80-real;90a-real;100-real;120-real;120-virtual", id="no-gpu"),
        pytest.param("", OLD, "80-real;90a-real;90-virtual", id="no-gpu-and-an-older-compiler"),
        pytest.param("9.0\n9.0\n", NEW, "90a-real", id="hopper"),
        pytest.param("8.6\n8.9\n7.5\n", OLD, "86-real;89-real", id="several-gpus"),
        pytest.param("8.0\n12.0\n", OLD, "80-real;90-virtual", id="a-gpu-newer-than-the-compiler"),
        pytest.param("7.5\n", NEW, "", id="only-older-gpus"),
        pytest.param("9.0\n", "", "90a-real", id="a-compiler-that-does-not-say"),
    ],
)
def test_build_targets_the_installed_gpus(monkeypatch, gpus, known, architectures):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("BAGEL_RT_CUDA_ARCHITECTURES", raising=False)
    spec = spec_from_file_location("bagel_rt_setup", ROOT / "setup.py")
    build = module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr(build, "output_of", lambda command, *_: gpus if command == "nvidia-smi" else known)
    assert build.cuda_architectures("nvcc") == architectures
    monkeypatch.setenv("BAGEL_RT_CUDA_ARCHITECTURES", "75")
    assert build.cuda_architectures("nvcc") == "75"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_install_with_a_broken_cuda_compiler_keeps_the_planner_and_the_error(tmp_path):
    tree, site, broken = copy_sources(tmp_path / "tree"), tmp_path / "site", tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 1\n")
    broken.chmod(0o755)
    environment = {"CUDACXX": str(broken), "BAGEL_RT_CUDA_ARCHITECTURES": "90a-real", "BAGEL_RT_CUDA": ""}
    output = pip("install", tree, "--target", str(site), **environment)
    assert "Installing without them" in output
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
