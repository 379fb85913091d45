# Everything a person does with the repository. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
DATASET ?= digits
# A folder of data sets inside or beside the checkout is used if there is one; INFOTDA_DATA overrides.
# one more than the cores: tests that wait for servers and kernels leave room
WORKERS ?= 3
PROFILE ?= quick
INFOTDA_DATA ?= $(abspath $(firstword $(wildcard data ../data ../shared/data)))
INFOTDA_CACHE ?= $(abspath out/cache)
export INFOTDA_DATA INFOTDA_CACHE

.DEFAULT_GOAL := help
FIGURES := $(patsubst nbs/figures/%.ipynb,out/figures/%.$(PROFILE),$(wildcard nbs/figures/*.ipynb))
.PHONY: help demo test check figures site site-test export readme clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready  ## train, attribute ten test images by three methods, write out/ (DATASET=digits or fashion_mnist)
	$(BIN)/python -m infotda.demo --dataset $(DATASET) --out out

test: export OMP_NUM_THREADS ?= 1
test: .venv/ready out/quanda/ready  ## every check: in sync, lint, house rules, every notebook from a fresh kernel, all tests
	$(BIN)/python -m pytest tests nbs --nbval-lax --nbval-current-env --nbval-cell-timeout=900 -q -n $(WORKERS) --dist loadfile

check: .venv/ready  ## the fast part of `make test`: in sync, lint, house rules
	$(BIN)/python -m pytest tests/test_repo.py -q

figures: export OMP_NUM_THREADS ?= 1
figures: $(FIGURES)  ## run the figures whose code has changed and store their outputs (-j2 for two at a time, PROFILE=quick or paper)

out/figures/%.$(PROFILE): nbs/figures/%.ipynb $(wildcard infotda/*.py) | .venv/ready
	@mkdir -p $(@D)
	INFOTDA_PROFILE=$(PROFILE) $(BIN)/python tests/notebooks.py run $<
	@touch $@

site: .venv/ready  ## the documentation, from the stored outputs, into _docs/
	$(BIN)/python tests/build_site.py

site-test: site  ## every page of it in a headless Chromium: links, pictures, mathematics, search
	$(BIN)/python -m pytest tests/check_site.py -q -n $(WORKERS)

export: .venv/ready  ## notebooks -> infotda/, cleaned, and README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/notebooks.py readme

readme: .venv/ready  ## README.md from nbs/index.ipynb
	$(BIN)/python tests/notebooks.py readme

clean:  ## remove the environment and everything a run left behind
	rm -rf .venv out _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache

.venv/ready: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "infotda needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# quanda pins old versions of what the rest uses, so it lives in a folder of its own (tests/with_quanda.py)
out/quanda/ready: tests/quanda.txt .venv/ready
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --ignore-requires-python --target $(@D)/site -r $<
	touch $@
