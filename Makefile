# All that one does to this tree. `make` alone lists it. Every target does its own set-up first.
#
# PYTHON=…  the Python that makes .venv (3.11 or 3.12; found by itself otherwise)
# TORCH=…   pip's words for torch, where the default gives another build than you want
# ARGS=…    handed on to what the target runs, such as: make test ARGS="-k ticket"

TORCH ?= torch==2.13.0
ARGS ?=
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu soak bench lint proto clean

help: ## say what there is
	@echo "Baton: prefill and decode apart. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s%s\n", $$1, $$2 }'

setup: ## make .venv with everything in it, and the `baton` command
	@python=$$(PYTHON="$(PYTHON)" sh .ci/find-python) && "$$python" .ci/make_venv.py --torch "$(TORCH)"

demo: setup ## a whole system on this machine, some answers, and who did what
	@echo "demo: starting"
	@$(BIN)/python -m demo_model.demo $(ARGS)

test: setup ## all tests but the soak
	@$(BIN)/python -m tests.run $(ARGS)

test-gpu: setup ## on a GPU, all tests that use one where there is one: kernels, models, engine
	@$(BIN)/python -m tests.gpu $(ARGS)

soak: setup ## the long fault schedules
	@echo "soak: pytest -m soak"
	@$(BIN)/python -m pytest -m soak $(ARGS)

bench: setup ## the engine alone, beside the limits of this machine; results in build/bench
	@echo "bench: a model of half a billion random weights"
	@$(BIN)/python -m bench.models build/half-billion
	@echo "bench: baton bench engine"
	@$(BIN)/baton bench engine --model=build/half-billion --max-num-seqs=32 --out=build/bench $(ARGS)

lint: setup ## ruff, mypy, proto rules, import rule
	@echo "lint: ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "lint: ruff format"
	@$(BIN)/ruff format --quiet --check .
	@echo "lint: mypy"
	@$(BIN)/mypy
	@echo "lint: import rule, proto rules, fresh protos"
	@$(BIN)/python -m pytest -q --durations=0 -p no:cacheprovider \
		tests/house/test_import_rule.py tests/house/test_proto_rules.py tests/house/test_proto_fresh.py

proto: setup ## generate baton/v1 from proto/baton/v1
	@echo "proto: baton/v1"
	@$(BIN)/python proto/generate.py

clean: ## remove .venv and all that tools left behind
	@echo "clean: .venv, caches, build"
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis engine/kernels/cpu/*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
