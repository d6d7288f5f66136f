# Every target makes .venv by itself, from the exact versions in .ci/constraints.txt; only python3, git and make are needed.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := test,plot,peft,qlora,track,data,lm-eval,sequence-parallel

.PHONY: demo test test-slow check style bench matrix

# PASSIVE: threads that wait must not take the cores from whatever else runs
demo: .venv/.demo  ## train, patch and measure a small model on real text
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hfpos demo

test: .venv/.ready  ## everything that needs neither a GPU nor minutes
	$(BIN)/pytest -n auto -m "not slow and not gpu"

test-slow: .venv/.ready
	$(BIN)/pytest -m "slow and not gpu"

check: .venv/.ready  ## lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/.ready  ## the same, repairing what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready
	$(BIN)/hfpos bench

matrix: .venv/.ready  ## what every seam and every scheme can do on which models, written into README.md
	$(BIN)/python -m hfpos.bench.conformance --write README.md

# what the demo needs is a good deal less than what the tests need
.venv/.demo: EXTRAS := plot
.venv/.demo .venv/.ready: pyproject.toml .ci/constraints.txt
	@echo "setting up .venv (the first time takes some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' -c .ci/constraints.txt
	@touch $@
