# make demo: the main job on data that needs no download.   make test: the fast test suite, a process a core.
# make test-all: what takes longer, with every extra, a real browser, servers and a cluster on loopback (Debian, root), and
# a tenth of the night's tests.   make test-nightly: all that takes longer still, and 30 small faults that tests must see.
# All make .venv first; nothing else is needed but Python >= 3.11 with venv, and make.
# bytecode is kept: each process of a test would compile everything anew
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-random test-all test-nightly lint clean

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	@touch $@

.venv/full: .venv/ready
	$(PIP) -e '.[full]'
	scripts/install_browser
	@touch $@

demo: .venv/ready
	$(BIN)/sparse-lab -m experiment=demo paths.outputs=outputs/demo
	$(BIN)/sparse-lab report outputs/demo

test: .venv/ready
	$(BIN)/python -m pytest --durations=20

# the same tests in an order drawn anew (pytest-randomly prints its seed)
test-random: .venv/ready
	$(BIN)/python -m pytest -o addopts="-q --import-mode=importlib --strict-markers -n auto" -m "not full and not nightly and not gpu"

test-all: .venv/full
	$(BIN)/python -m pytest -m "full or nightly" --tenth --durations=20

test-nightly: .venv/full
	NIGHT=1 $(BIN)/python -m pytest -m nightly --durations=20
	NIGHT=1 $(BIN)/python -m pytest tests/sparse_cpu tests/sparsity tests/export/test_forged.py  # properties with all their examples
	$(BIN)/python scripts/mutation_check.py --all

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv outputs/demo
