# Each word is one line that can also be typed by hand. `make demo` and `make test` start from nothing.
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PROTOS := $(shell find protos -name '*.proto')

.PHONY: setup protos check format test test-all bench bench-quick bench-table bench-identity bench-learning demo serve golden lock clean

setup: $(VENV)/.installed

$(VENV)/.dependencies: requirements/dev.lock
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --require-hashes -r requirements/dev.lock
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml protos/generate.py protos/build_hook.py $(PROTOS)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PY) -m server.decisioning.warm
	$(PY) -m training.warm
	touch $@

protos: $(VENV)/.dependencies
	$(PY) protos/generate.py
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code
	$(PY) -m pytest tests/architecture

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Compiled first, because the tests start some hundred programs, and Python may be told to write no bytecode.
test: setup
	$(PY) -m compileall -q server training protos tests/support
	$(PY) -m pytest -m "not long" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(if $(PYTEST_REPORT),--junitxml=$(PYTEST_REPORT))

test-all: setup
	$(PY) -m pytest

golden: setup
	TSUGI_REWRITE_GOLDEN=1 $(PY) -m pytest tests/golden || true
	git diff --stat -- tests/golden

demo: setup
	$(PY) -m training demo

serve: setup
	$(BIN)/tsugi serve

lock: $(VENV)/.dependencies
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml -o requirements/core.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --extra training pyproject.toml -o requirements/training.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --all-extras pyproject.toml -o requirements/dev.lock

bench: setup
	$(PY) -m tests.benchmark

bench-quick: setup
	$(PY) -m tests.benchmark --quick

bench-identity: setup
	$(PY) -m tests.benchmark.identity $(if $(DATA),--data $(DATA)) $(IDENTITY)

bench-learning: setup
	$(PY) -m tests.benchmark.learning $(if $(DATA),--data $(DATA)) $(LEARNING)

bench-table: setup
	$(PY) -m tests.benchmark --table
