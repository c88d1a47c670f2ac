# Every target makes what it needs: a virtual environment in .venv with the versions of .ci/constraints.txt.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
MODEL ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test quality format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## train and try an adapter on a small model (MODEL=name-or-path, DEMO_ARGS="...")
	@$(BIN)/python examples/demo/demo.py $(if $(MODEL),--model "$(MODEL)") $(DEMO_ARGS)

# One torch thread a worker, or the workers fight over the cores; a file stays with one worker, so that what its session
# fixtures set up (a server, a trained adapter) is set up once. Files start in their order, the slow ones of
# integration/ first, or one worker is left with them at the end. A worker that is lost makes the run fail: with another in
# its place, a run can wait for good.
test: $(VENV)/.installed-test ## run the tests, offline (PYTEST_ARGS="-k positions", WORKERS=4)
	@HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_ARGS)

quality: $(VENV)/.installed-dev ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## mend what can be mended: imports, lint, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the versions in .ci/constraints.txt need Python 3.11 or later: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)

# .installed-demo, .installed-test, .installed-dev: an extra is installed again only when what it depends on has changed.
$(VENV)/.installed-%: pyproject.toml .ci/constraints.txt peft_reft/autoload.py | $(BIN)/python
	@echo "installing peft_reft[$*] into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[$*]"
	@touch $@
