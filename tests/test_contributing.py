"""Commands of contributors: the Makefile, the pre-commit hooks and CI run the same ones."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands_of(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n?)+)", text, re.MULTILINE)
    return [line.strip() for line in recipe.splitlines()]


def test_hooks_are_the_commands_of_make_lint_and_download_nothing():
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert [hook["entry"] for hook in repository["hooks"]] == [
        line.removesuffix(" csrc/*") for line in commands_of("lint")
    ]


def test_readme_and_ci_run_the_tests_like_make():
    (command,) = commands_of("test")
    assert f'pip install -e ".[test]" && {command}\n' in (ROOT / "README.md").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"\n{command}\n" in ci and "\nmake lint" in ci
    assert commands_of("fast") == [f'{command} -m "not slow"']


def test_contributing_guide_names_every_target_and_existing_files():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets.split():
        assert f"`make {target}`" in guide, target
    for link in re.findall(r"\]\(([^)#]+)", guide):
        assert (ROOT / link).exists(), link


def test_the_version_is_in_one_place():
    version = re.search(r'__version__ = "(.*)"', (ROOT / "bagel_rt/__init__.py").read_text())[1]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "CMakeLists.txt"):
        assert version not in (ROOT / name).read_text(), name
