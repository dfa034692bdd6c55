# `make demo` and `make test` need GNU make, a POSIX shell and Python >= 3.11 with venv and pip (or uv), and no more:
# requirements/install.sh sets up $(VENV) from pinned, hashed wheels, once.
#
#   make demo ARGS='--port 9000 --pods 3'     arguments for `gateway-extproc demo`
#   make test ARGS='-k limits -x'             arguments for pytest
#   PYTHON=python3.12   the Python to use        UV=   do without uv        VENV=dir   another place than .venv

VENV ?= .venv
UV ?= uv
PYTHON ?=
export VENV UV PYTHON
BIN = $(VENV)/bin
# Two files at a time; ARGS='-n 0' has one process, for --pdb.
PYTEST = "$(BIN)/python" -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bench-check proto lint format types requirements manifests kubernetes-binaries clean venv-demo venv-dev

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

demo: venv-demo ## Envoy, Valkey, the gateway and simulated pods on this machine; Ctrl-C ends it
	@exec "$(BIN)/gateway-extproc" demo $(ARGS)

test: venv-dev ## the tests, with the real Envoy and the real Valkey
	@exec $(PYTEST) -m "not long" $(ARGS)

check: lint types ## all that CI runs: lint, types, layers, generated files are current, all tests
	@"$(BIN)/python" proto/generate.py --check
	@"$(BIN)/python" -m gateway_extproc.config_reference --check
	@"$(BIN)/python" -m gateway_extproc.chart --check
	@exec $(PYTEST) $(ARGS)

bench: venv-dev ## what a request costs, and each goal with its figure; some 16 minutes
	@exec "$(BIN)/python" -m tests.bench $(ARGS)

bench-check: venv-dev ## whether it costs more than it did (tests/bench/baseline.json)
	@exec "$(BIN)/python" -m tests.bench --check $(ARGS)

kubernetes-binaries: venv-dev ## build what tests/kubernetes runs: once, with Go, some 20 minutes
	@exec "$(BIN)/python" -m tests.kubernetes.programs

lint: venv-dev ## ruff, and the layers
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/lint-imports"

types: venv-dev ## mypy --strict
	@"$(BIN)/mypy"

format: venv-dev ## ruff's fixes and form
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

proto: venv-dev ## wire/_pb anew from proto/*.proto
	@"$(BIN)/python" proto/generate.py

# The first file decides (ARGS=--upgrade, or ARGS='-P redis'); the others start from its pins, so they agree with it.
COMPILE = UV_FIND_LINKS= "$(BIN)/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--only-binary :all: --no-emit-index-url --no-emit-find-links --custom-compile-command "make requirements" \
	pyproject.toml

requirements: venv-dev ## requirements/*.txt anew from pyproject.toml
	@$(COMPILE) requirements/build.in --all-extras -o requirements/dev.txt $(ARGS)
	@cp requirements/dev.txt requirements/demo.txt
	@$(COMPILE) requirements/build.in --extra demo -o requirements/demo.txt
	@cp requirements/dev.txt requirements/runtime.txt
	@$(COMPILE) --extra kubernetes -o requirements/runtime.txt

HELM ?= helm
KUBERNETES ?= 1.36.0

manifests: venv-dev ## what the chart takes from the code, and charts/manifests anew from it; needs helm
	@"$(BIN)/python" -m gateway_extproc.chart
	@"$(HELM)" template gateway-extproc charts/gateway-extproc --namespace gateway-extproc --skip-tests \
		--kube-version $(KUBERNETES) --values charts/manifests/values.yaml > charts/manifests/gateway-extproc.yaml

clean: ## no caches, no virtual environment
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	@if [ -f "$(VENV)/.made-by-make" ]; then rm -rf "$(VENV)"; fi

venv-demo:
	@sh requirements/install.sh demo

venv-dev:
	@sh requirements/install.sh dev
