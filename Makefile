# `make` alone lists the targets. Each does everything that it needs: from a fresh clone, `make demo` is one command.

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= cpu,otel,ray,dev
JOBS   ?= 4
BIN    := $(VENV)/bin
AUDIT  := $(VENV)-audit
SDK    := $(VENV)-sdk
STAMP  := $(VENV)/.set-up

# Nothing is ever fetched from a model hub, and tokenizers start no threads of their own beside torch's.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help setup demo serve migrate stack test test-ui docs lint format typecheck openapi openapi-check sdk audit check bench bench-quick load faults ray lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n  PYTHON=python3.12 make setup      another interpreter (3.11 or newer)\n'
	@printf '  EXTRAS=gpu,otel,ray,dev VENV=.venv-gpu make setup      FAISS for a GPU, in an environment of its own\n'

setup: $(STAMP) ## make .venv with the pinned versions (once; again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Headwater needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another one: make setup PYTHON=python3.12")'
	@echo 'setting up $(VENV): a few minutes, once'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## the main job on a small real model, from nothing to two answers; leaves the service up (Ctrl-C ends it)
	$(BIN)/headwater demo $(ARGS)

serve: $(STAMP) ## serve the API on HEADWATER_PORT (8000)
	$(BIN)/headwater serve $(ARGS)

migrate: $(STAMP) ## bring the database of HEADWATER_DATABASE_URL to the revision that this version needs
	$(BIN)/headwater migrate $(ARGS)

stack: $(STAMP) ## PostgreSQL, Redis, an API and two workers as plain processes, as docker-compose.yml has them (Ctrl-C ends all)
	$(BIN)/headwater stack $(ARGS)

test: export OMP_NUM_THREADS = 1
test: $(STAMP) ## run the tests (ARGS='-k name' for some of them; JOBS=1 in one process; four fill two cores, since many wait)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-ui: export OMP_NUM_THREADS = 1
test-ui: $(STAMP) $(VENV)/.with-ui ## walk the page in a real Chromium (apt-get install chromium), on a real service
	$(BIN)/python -m pytest tests/ui $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP) $(VENV)/.with-docs ## build the documentation into build/docs; a link or an anchor that leads nowhere is an error
	$(BIN)/python -m mkdocs build $(ARGS)
	@echo 'read it: $(PYTHON) -m http.server --directory build/docs 8400'

# an extra that one target alone needs: make test-ui, make docs
$(VENV)/.with-%: pyproject.toml constraints.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

lint: $(STAMP) ## ruff's rules and format, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff repair and format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## mypy --strict on app/, workers/ and sdk/
	$(BIN)/mypy

openapi: $(STAMP) ## write openapi/openapi.json, the document as served, and docs/cli.md, the commands' help
	$(BIN)/headwater openapi --write
	$(BIN)/python -m app.cli.reference

openapi-check: $(STAMP) ## fail when openapi/openapi.json is not the document that is served
	$(BIN)/headwater openapi --check

sdk: ## build the SDK's wheel into dist/sdk, install it into an empty environment and use it there, where no torch is
	rm -rf $(SDK) dist/sdk
	$(PYTHON) -m venv $(SDK)
	$(SDK)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist/sdk ./sdk
	$(SDK)/bin/python -m pip install --quiet --constraint constraints.txt dist/sdk/headwater_client-*.whl
	$(SDK)/bin/python -I .ci/sdk.py

audit: ## look the pinned versions up in the published advisories (needs a network)
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit==2.10.1; }
	@$(PYTHON) .ci/audit.py $(AUDIT)/bin/pip-audit

check: lint typecheck openapi-check sdk docs test ## all that CI runs, but for the browser (test-ui)

bench: $(STAMP) ## run the benchmarks: print their tables, write benchmarks/out/*.json (two hours; docs/results.md has ours)
	$(BIN)/headwater demo --exit > /dev/null  # brings the model that they measure
	$(BIN)/python benchmarks/catalog.py --json benchmarks/out/catalog.json
	$(BIN)/python benchmarks/speed.py --json benchmarks/out/speed.json
	$(BIN)/python benchmarks/planted.py --json benchmarks/out/planted-tiny.json
	$(BIN)/python benchmarks/planted.py --model smollm2 --json benchmarks/out/planted-smollm2.json
	$(BIN)/python benchmarks/unlearn.py --json benchmarks/out/unlearn.json
	$(BIN)/python benchmarks/valuation.py
	$(BIN)/python benchmarks/search.py --json benchmarks/out/search.json
	$(BIN)/python benchmarks/scale.py --json benchmarks/out/scale.json
	$(BIN)/python benchmarks/peers.py answers --json benchmarks/out/answers.json
	$(BIN)/python benchmarks/peers.py cost --http --json benchmarks/out/peers.json
	$(BIN)/python benchmarks/quality.py --answers benchmarks/out/answers --json benchmarks/out/quality.json

bench-quick: export OMP_NUM_THREADS = 1
bench-quick: $(STAMP) ## the benchmark of answers on a smaller world (half a minute of one core); what CI runs of them
	$(BIN)/python benchmarks/quality.py --quick

load: $(STAMP) ## the service under load: what sharing passes gives, latencies, memory (two minutes; ARGS='--seconds 600')
	$(BIN)/python benchmarks/load.py --json benchmarks/out/load.json $(ARGS)

faults: export OMP_NUM_THREADS = 1
faults: $(STAMP) ## kill workers, stop servers, fill disks: print what each cost, write benchmarks/out/faults.json (ten minutes)
	$(BIN)/python -m benchmarks.faults --json benchmarks/out/faults.json $(ARGS)

ray: $(STAMP) ## an index on a Ray cluster of three nodes: latency by number of shards, an actor and a node killed
	$(BIN)/python benchmarks/sharded.py --json benchmarks/out/sharded.json $(ARGS)

lock: $(STAMP) $(VENV)/.with-ui $(VENV)/.with-docs ## write the versions installed in .venv to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools | sed -E '/^#/d; s/^(torch==[0-9.]+)\+.*/\1/'; } > constraints.new
	@mv constraints.new constraints.txt && touch $(STAMP)

clean: ## remove .venv and every cache; what the demo and the service keep (.headwater, data) stays
	rm -rf $(VENV) $(AUDIT) $(SDK) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .schemathesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
