# Two commands on a machine that has Python 3.10 or newer, make and git:
#
#     make demo       six tenants on two targets, on a throw-away PostgreSQL; the picture lands in .demo/
#     make test       linting, typing and the tests, on a throw-away PostgreSQL
#     make bench      dblock beside the raw driver and its peers; table and plots land in .bench/
#     make docs       the pages as a site, in .docs/
#
# and one for patient people, on Linux:
#
#     make soak       many processes, through every door, while everything breaks that can; MINUTES=20
#
# Everything they need goes into .venv. PYTHON=… chooses the interpreter, PYTEST_ARGS=… is handed to pytest: -n 0 runs
# the tests one after the other.

PYTHON ?=
PYTEST_ARGS ?=
MINUTES ?= 20

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The tests start Python a thousand times: what was compiled once is not compiled again.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = .venv/bin/python -m pip install --quiet

.PHONY: help demo test check bench soak docs picture templates clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

demo: .venv/with-demo
	@mkdir -p .demo
	@.venv/bin/dblock demo --svg .demo/demo.svg

test: .venv/with-everything
	.venv/bin/ruff check dblock tests benchmarks octopus docs
	.venv/bin/ruff format --check dblock tests benchmarks octopus docs
	.venv/bin/mypy
	.venv/bin/mypy --platform win32 --package dblock
	.venv/bin/pytest -n 4 --dist loadgroup $(PYTEST_ARGS)

# What the CI runs is the same, and nothing else.
check: test

bench: .venv/with-everything
	@$(PIP_INSTALL) --group bench
	@.venv/bin/python -m benchmarks --output .bench

# What was found lands in .soak/ as well; DBLOCK_TEST_MSSQL_URL brings a SQL Server in.
soak: .venv/with-everything
	@.venv/bin/python -m tests.soak --minutes $(MINUTES) --json .soak/found.json

docs: .venv/with-everything
	@.venv/bin/python -m sphinx --fail-on-warning --keep-going -q docs .docs
	@echo "the pages are in .docs/index.html"

# The picture in the README.
picture: .venv/with-demo
	.venv/bin/dblock demo --targets 1 --svg docs/demo.svg

# The step templates, after a change of one of their scripts or of the raw ones.
templates: .venv/made
	.venv/bin/python octopus/pack.py

clean:
	rm -rf .venv .demo .bench .soak .docs .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# Installed in place: what is edited is what runs. The stamps let a second run begin at once.
.venv/with-demo: pyproject.toml | .venv/made
	@echo "installing dblock and what the demo needs into .venv"
	@$(PIP_INSTALL) --editable '.[demo]'
	@touch $@

.venv/with-everything: pyproject.toml | .venv/made
	@echo "installing dblock, all its extras and the developers' tools into .venv"
	@$(PIP_INSTALL) --editable '.[all]' --group dev
	@touch $@ .venv/with-demo

# The first interpreter that is new enough counts, since python3 is an old one on some machines. Dependency groups need
# a newer pip than most interpreters bring along.
.venv/made:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	        if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	            echo "$$python cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; \
	            exit 1; \
	        fi; \
	        echo "making .venv with $$("$$python" --version)"; \
	        "$$python" -m venv .venv && $(PIP_INSTALL) --upgrade 'pip>=25.1' && touch $@; \
	        exit; \
	    fi; \
	done; \
	echo "no Python 3.10 or newer found: install one, or name it: make PYTHON=/path/to/python3 …" >&2; \
	exit 1
