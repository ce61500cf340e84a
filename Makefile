# Python 3.11 or newer, git and make are all that is needed: every target makes the virtual
# environment that it runs in. PYTHON=python3.12 picks the interpreter (else the newest on
# PATH), VENV=.venv-3.12 another environment.

VENV ?= .venv
EXTRAS ?= dev mcp server otel prometheus
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
UNIT := not slow and not process
# tests/conftest.py says how many.
WORKERS := --numprocesses=auto --max-worker-restart=0
PROTO_PY := .venv-proto/bin/python
PROTO := $(wildcard src/prodisco_sandbox/proto/*.proto)
# Directories too: they change when a file goes.
SOURCES := $(shell find src \( -name __pycache__ -o -name .mypy_cache \) -prune -o -print)
# The test that compares the stubs skips where no Python is old enough to generate them.
PROTO_VENV := $(if $(or $(wildcard $(PROTO_PY)),$(shell tools/find-python 13 2>/dev/null)),.venv-proto/.tools)

export PYTHON
# Where it is set, every worker of every run prepares all tests anew, six seconds of a processor.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test coverage slow science reliability bench plot picture docs typing release-check unit envtest compat lowest check format proto clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(VENV)/.installed $(if $(filter dev,$(EXTRAS)),$(VENV)/.collected) ## set up .venv: the tools, and the package as a built wheel

demo: $(VENV)/.installed ## two sessions, each in a sandbox of its own, on this machine
	@$(PY) examples/demo.py

test: $(VENV)/.installed $(VENV)/.collected $(PROTO_VENV) ## all but the slow tests
	@$(PY) -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

coverage: $(VENV)/.installed $(PROTO_VENV) ## make test with branch coverage, and a report in htmlcov/
	@tools/run-coverage $(PY) $(WORKERS) -m "not slow" $(PYTEST_ARGS)

slow: $(VENV)/.installed $(PROTO_VENV) ## the tests that take long
	@$(PY) -m pytest -m slow $(PYTEST_ARGS)

science: ## the tests that need NumPy, pandas and Matplotlib, in .venv-science
	@$(MAKE) --no-print-directory venv VENV=.venv-science EXTRAS="dev mcp server otel prometheus science"
	@PRODISCO_MUST_RUN=science .venv-science/bin/python -m pytest -m science $(PYTEST_ARGS)

reliability: $(VENV)/.installed ## the reliability campaign, some ten minutes (SCALE=0.2: a fifth of it)
	@$(PY) tools/campaign.py --scale $(or $(SCALE),1)

bench: $(VENV)/.installed ## the benchmarks of docs/benchmarks.md (BENCH=--quick: a look, in a minute)
	@$(PY) -m benchmarks $(BENCH) --json $(VENV)/benchmarks.json

plot: .venv-plot/.tools $(VENV)/benchmarks.json ## draw docs/benchmarks.svg from what the last make bench has measured
	@.venv-plot/bin/python tools/plot.py $(VENV)/benchmarks.json docs/benchmarks.svg

picture: $(VENV)/.installed ## draw docs/demo.svg from what the demo prints, and the badges
	@$(PY) examples/demo.py | $(PY) tools/picture.py docs/demo.svg
	@$(PY) tools/badges.py docs/badges

docs: ## the documentation site, in .venv-docs/site/html; warnings and broken links are errors
	@$(MAKE) --no-print-directory venv VENV=.venv-docs EXTRAS="docs mcp server"
	@.venv-docs/bin/python tools/build_docs.py .venv-docs/site

typing: ## a user's program under mypy and pyright, both strict, against the wheel
	@$(MAKE) --no-print-directory venv VENV=.venv-typing EXTRAS="typing mcp"
	@cd tests/user && ../../.venv-typing/bin/python -m mypy --strict --config-file= --cache-dir=/dev/null .
	@cd tests/user && ../../.venv-typing/bin/python -m pyright --pythonpath ../../.venv-typing/bin/python .

release-check: ## all of a release but the upload, and the workflows (DIST=directory: keep what is built there)
	@$(MAKE) --no-print-directory .venv-release/.tools VENV=.venv-release EXTRAS=release
	@.venv-release/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@.venv-release/bin/zizmor --quiet --offline .github/workflows
	@.venv-release/bin/python tools/release_check.py $(DIST)

$(VENV)/benchmarks.json:
	@$(MAKE) --no-print-directory bench

unit: $(VENV)/.installed $(PROTO_VENV) ## the tests that start no process, in half a minute
	@$(PY) -m pytest $(WORKERS) -m "$(UNIT)" $(PYTEST_ARGS)

envtest: $(VENV)/.installed ## the tests on a real API server alone, the one that KUBEBUILDER_ASSETS names
	@$(PY) -m pytest -m envtest $(PYTEST_ARGS)

compat: $(VENV)/.installed ## run other projects' MCP clients against the program; installs them (CLIENTS="ts1 ts2": these)
	@$(PY) compat/run.py $(CLIENTS)

lowest: ## the quick tests with the lowest versions that pyproject.toml allows
	@$(MAKE) --no-print-directory unit UNIT="not slow and not envtest" VENV=.venv-lowest BOUNDS=--lowest \
	    PYTHON="$${PYTHON:-$$(tools/find-python 11 2>/dev/null || tools/find-python 13)}"

check: $(VENV)/.installed ## ruff, mypy --strict and the direction of imports
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

format: $(VENV)/.installed ## let ruff format and fix what it can
	@$(PY) -m ruff format
	@$(PY) -m ruff check --fix

proto: .venv-proto/.tools ## generate the gRPC stubs anew
	@PATH="$(CURDIR)/.venv-proto/bin:$$PATH" $(PROTO_PY) -m grpc_tools.protoc -Isrc \
	    --python_out=src --grpc_python_out=src --mypy_out=quiet:src --mypy_grpc_out=quiet:src $(PROTO)

clean: ## remove all that the targets made
	@rm -rf .venv .venv-* dist htmlcov .coverage .coverage.* .hypothesis .import_linter_cache
	@rm -rf .mypy_cache .pytest_cache .ruff_cache
	@find src tests examples tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Stamps are written last: an interrupted step is done again.

$(VENV)/.installed: $(VENV)/.tools $(VENV)/.wheel
	@$(PY) $(PIP_INSTALL) --no-deps --force-reinstall $(VENV)/dist/*.whl
	@touch $@

# Once, what each worker of the first run would do: compile all tests, and collect constants for hypothesis.
$(VENV)/.collected: | $(VENV)/.installed
	@$(PY) -m pytest --quiet -k test_no_text_is_taken_for_a_handle >/dev/null || true # make test says what is wrong.
	@touch $@

$(VENV)/.wheel: pyproject.toml README.md LICENSE $(SOURCES) | $(VENV)/.tools
	@rm -f $(VENV)/dist/*.whl
	@$(PY) -m pip wheel --quiet --no-deps --no-build-isolation -w $(VENV)/dist .
	@touch $@

# An environment whose Python is gone, or another than PYTHON asks for, is made anew.
have := $(shell $(PY) -V 2>/dev/null)
want := $(if $(PYTHON),$(shell "$(PYTHON)" -V 2>/dev/null),$(have))
ifneq ($(have),$(or $(want),any))
$(VENV)/.tools: FORCE
endif

$(VENV)/.tools: pyproject.toml tools/find-python tools/requirements.py
	@python=$$(tools/find-python) && if [ "$$($(PY) -V 2>&1)" != "$$("$$python" -V 2>&1)" ]; then \
	    echo "Making $(VENV) with $$("$$python" -V)"; "$$python" -m venv --clear $(VENV); fi
	@$(PY) tools/requirements.py $(BOUNDS) $(EXTRAS) >$(VENV)/requirements.txt
	@$(PY) $(PIP_INSTALL) -r $(VENV)/requirements.txt
	@touch $@

.venv-proto/.tools: tools/proto-requirements.txt
	@python=$$(tools/find-python 13) && echo "Making .venv-proto with $$("$$python" -V)" && \
	    "$$python" -m venv --clear .venv-proto
	@$(PROTO_PY) $(PIP_INSTALL) -r $<
	@touch $@

.venv-plot/.tools: Makefile
	@python=$$(tools/find-python) && "$$python" -m venv --clear .venv-plot
	@.venv-plot/bin/python $(PIP_INSTALL) "matplotlib>=3.9,<4"
	@touch $@
