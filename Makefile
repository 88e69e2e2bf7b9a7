# The commands that people here use, in the environment that `make setup` makes. CI's are the same
# (.ci/run), but in fresh environments.

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1	\2/p' Makefile

setup:  ## make the environment, this checkout in it; checks before every commit
	python3 -m venv .venv && .venv/bin/pip install -e '.[dev]'
	.venv/bin/pre-commit install

test:  ## the fast tests
	.venv/bin/python -m pytest

slow:  ## what takes minutes, and property tests on random examples
	.venv/bin/python -m pytest -m slow

lint:  ## ruff
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types:  ## mypy and pyright
	.venv/bin/mypy
	.venv/bin/basedpyright

site:  ## the pages as a site, in build/site
	.venv/bin/mkdocs build --strict -f docs/site/mkdocs.yml

files:  ## files that the tests read: hostile ones, vectors of the codec
	.venv/bin/python tests/hostile/make.py
	.venv/bin/python tests/vectors/make.py

tables:  ## pages that are written by a run: operators
	.venv/bin/python -m benchmarks.conformance --write docs/operators.md

bench:  ## networks against other engines; needs `pip install -e '.[benchmarks]'`, takes hours
	.venv/bin/python -m benchmarks.compare --json build/results.json --plot build/ratios.svg

.PHONY: help setup test slow lint types site files tables bench
