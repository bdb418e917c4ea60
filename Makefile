# Postroad: `make` lists what there is.
.DEFAULT_GOAL := help
.PHONY: help setup demo up down status logs check lint types imports prose protos schema baseline fmt \
	test test-long unit integration e2e chaos simulate bench lock clean

PYTHON := .venv/bin/python
STACK := $(PYTHON) -m deploy.local
BASELINE := protos/baseline.binpb

# Without its compiled files, a process takes a second longer to start, and a run starts thousands.
unexport PYTHONDONTWRITEBYTECODE

# Python, its stubs, and gRPC for the one file that has a service.
define generate
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PYTHON) -m grpc_tools.protoc -Iprotos \
		--python_out=$(1) --mypy_out=quiet:$(1) protos/postroad/v1/*.proto && \
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PYTHON) -m grpc_tools.protoc -Iprotos \
		--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) protos/postroad/v1/task_service.proto
endef

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: Debian packages, .venv, Kafka, MySQL (quick when all is there)
	@python3 -m deploy.local.setup
	@[ ! -e .git ] || git config core.hooksPath >/dev/null || git config core.hooksPath tools/hooks || true

demo: setup ## start the system and show a dozen tasks end in every way (DEMO_TASKS=n for more)
	@$(PYTHON) -m deploy.local.demo

up: setup ## start the system (ARGS="--sender 3" for more replicas)
	@$(STACK) up $(ARGS)

down: ## stop it; ARGS=--wipe deletes its data too
	@$(STACK) down $(ARGS)

status: ## what runs, where, and how it is
	@$(STACK) status

logs: ## the end of each log; all of one: make logs NAME=sender-1
	@$(STACK) logs $(NAME)

check: setup lint types imports prose schema ## every check that runs no test: style, types, imports, prose, protos

lint: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: setup
	@$(PYTHON) -m mypy

imports: setup
	@.venv/bin/lint-imports

prose: setup ## check the language of documents, docstrings, comments and names (docs/glossary.md)
	@$(PYTHON) -m tools.prose $(ARGS)

protos: setup ## generate the code beside the protos
	@$(call generate,protos)

schema: setup ## check that the protos are in style, break no client, and match the code beside them
	@.venv/bin/buf lint protos
	@.venv/bin/buf breaking protos --against $(BASELINE)
	@rm -rf .venv/protos && mkdir -p .venv/protos && $(call generate,.venv/protos)
	@for file in $$(cd .venv/protos && find . -type f); do cmp .venv/protos/$$file protos/$$file; done

baseline: schema ## at a release: take today's protos as those that clients hold
	@.venv/bin/buf build protos -o $(BASELINE)

fmt: setup ## format the code
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

test: ## every test, on real servers (ARGS="-k name" for some)
	@python3 -m deploy.local.setup --tests
	@$(PYTHON) -m pytest -n 6 --dist loadgroup --no-loadscope-reorder --max-worker-restart=0 $(ARGS)

test-long: ## every test, in its long form if it has one: tens of minutes
	@python3 -m deploy.local.setup --tests
	@POSTROAD_TEST_LONG=1 $(PYTHON) -m pytest -n 6 --dist loadgroup --no-loadscope-reorder --max-worker-restart=0 $(ARGS)

unit: setup ## the tests that need no server
	@$(PYTHON) -m pytest tests/unit $(ARGS)

integration: setup ## the tests on a real Kafka, MySQL, DNS and SMTP
	@$(PYTHON) -m pytest tests/integration $(ARGS)

e2e: setup ## the tests of the whole system
	@$(PYTHON) -m pytest tests/e2e $(ARGS)

chaos: setup ## kill, freeze and cut off processes under load (ARGS="--seed 1 --minutes 10")
	@$(PYTHON) -m tests.chaos $(ARGS)

simulate: setup ## tens of thousands of interleavings with faults, in memory (ARGS="--seconds 600" for more)
	@$(PYTHON) -m tests.simulation $(ARGS)

bench: setup ## measure the pipeline on this machine (ARGS="idle" for another scenario, docs/performance.md)
	@$(PYTHON) -m tests.bench $(ARGS)

lock: setup ## pin the dependencies of pyproject.toml again, with hashes
	@.venv/bin/uv pip compile -q --generate-hashes --no-header --no-annotate --universal --python-version 3.11 \
		pyproject.toml -o requirements.lock
	@.venv/bin/uv pip compile -q --generate-hashes --no-header --no-annotate --universal --python-version 3.11 \
		--extra dev pyproject.toml -o requirements-dev.lock

clean: ## stop the system and delete .local, .venv and what the tools left
	@[ ! -x $(PYTHON) ] || $(STACK) down --wipe
	@rm -rf .local .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
