# Commands for contributors, in the environment of `pip install -e ".[test]"`.
.PHONY: test fast lint docs bench

test: # as in README.md; 15 minutes on two cores
	pytest -n auto --dist loadfile

fast: # without sweeps, builds and servers; 3 minutes
	pytest -n auto --dist loadfile -m "not slow"

lint: # the same commands as .pre-commit-config.yaml
	ruff check
	ruff format --check
	mypy
	clang-format --dry-run --Werror csrc/*

docs: # into build/docs
	mkdocs build --strict

bench: # host overhead, on any machine; on a GPU see docs/benchmarks.md
	python -m benchmarks.host
