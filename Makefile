# `make help` lists the targets. Each one does its own set-up on a machine that has only Python.

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.attnres-installed-
CHECKOUT := $(VENV)/.attnres-checkout
TYPECHECK := build/typecheck

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow lint format reinstall

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  JOBS=$(JOBS)  PYTEST_ARGS=...  DEMO_ARGS=..."

demo: $(INSTALLED)demo ## convert a small trained model, prove it lossless, train it on
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# The pytest command and not `python -m pytest`, which would put the repository root on sys.path.
test: $(INSTALLED)test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(INSTALLED)test ## run the long sweeps that `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m slow $(PYTEST_ARGS)

# mypy cannot follow an editable install, so it sees the package as it will be installed, through
# links; sed turns the paths in its messages back into the paths of this repository.
lint: $(INSTALLED)lint ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPECHECK)
	mkdir -p $(TYPECHECK)/attnres_compile
	ln -s $(CURDIR)/attnres_compile/* $(CURDIR)/passes $(CURDIR)/kernels $(TYPECHECK)/attnres_compile
	set -o pipefail; cd $(TYPECHECK) && \
	$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache | \
	sed -E 's#^attnres_compile/(passes|kernels)/#\1/#'

format: $(INSTALLED)lint ## rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ensurepip writes bin/pip last, so a virtual environment without it is not complete.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# A file per extra says that it is installed. One more says from which checkout: a virtual
# environment that is shared with another checkout would otherwise run the other's code.
ifneq ($(shell cat $(CHECKOUT) 2>/dev/null),$(CURDIR))
REINSTALL := reinstall
endif

$(INSTALLED)%: pyproject.toml $(REINSTALL) | $(VENV)/bin/pip
	@echo "Installing attnres-compile[$*] into $(VENV); with PyTorch, the first time takes minutes."
	@rm -f $@ $(if $(REINSTALL),$(INSTALLED)*)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@echo $(CURDIR) > $(CHECKOUT)
	@touch $@
