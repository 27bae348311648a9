# Two commands: `make demo` (install, then the main job on the bundled model) and `make test` (install, lint, type check, tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# At most four workers, two threads each, whatever the machine.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test test-all test-lowest test-newest test-vllm-versions lint format docs wheel kills laws mutants clean

# Of 29,000 modules few are imported: they are compiled then, not all of them now (a minute).
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/hf-prune demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file goes to one worker: what its tests share (commands that ran, processes, hostile checkpoints) is made once.
test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

# With the slow ones: more families, notebooks and pages, whose kind the others show too.
test-all: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The documents as a site in build/site; a link that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Kill every long command twenty times at random places; it must end with the same bits.
kills: install
	HF_PRUNE_KILLS=20 $(BIN)/pytest tests/test_kills.py

# Random plans over 24 families, until there are 10,000 in docs/laws.json (about 40 minutes of one core); goes on where it stopped.
laws: install
	$(BIN)/python tests/benchmarks/laws.py --cases 10000

# Small faults in structure, surgery and checkpoint, 25 in each (docs/mutants.json); goes on where it stopped.
mutants: install
	$(BIN)/python tests/benchmarks/mutants.py --per-folder 25

# What pyproject.toml says is enough: a chosen set of tests with the lower bound of every dependency but torch (whose CPU builds
# differ between indexes: TORCH=2.6.0 asks for one), and with the newest releases.
LANE_TESTS := tests/test_structure.py tests/test_surgery.py tests/test_per_layer.py tests/test_loading.py tests/test_saving.py \
  tests/test_pipeline.py tests/test_config.py tests/test_data.py tests/test_recovery_in_place.py tests/test_readme.py
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

test-lowest:
	test -x $(VENV)/lowest/bin/python || $(PYTHON) -m venv $(VENV)/lowest
	sed -n '/^dependencies/,/^]/ s/^  "\([a-z0-9-]*\)>=\(.*\)",/\1==\2/p' pyproject.toml | sed 's/^torch==.*/torch==$(TORCH)/' > $(VENV)/lowest/pins.txt
	$(VENV)/lowest/bin/python -m pip install --quiet --constraint $(VENV)/lowest/pins.txt --editable . pytest hypothesis pytest-xdist scipy
	$(VENV)/lowest/bin/pytest -n $(WORKERS) --dist loadfile $(LANE_TESTS)

test-newest:
	test -x $(VENV)/newest/bin/python || $(PYTHON) -m venv $(VENV)/newest
	$(VENV)/newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager torch==$(TORCH) --editable '.[plot]' pytest hypothesis pytest-xdist scipy
	$(VENV)/newest/bin/pytest -n $(WORKERS) --dist loadfile $(LANE_TESTS)

# One file that installs anywhere, into dist/.
wheel: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# The loader and the vLLM plugin with the oldest and the newest transformers that vLLM takes. (Bloom's static cache fails
# with 5.20, for dense models too.)
test-vllm-versions: install
	for version in 5.16.0 5.20.0; do \
	  own=$(VENV)/transformers-$$version; \
	  test -d $$own || $(BIN)/python -m pip install --quiet --target $$own transformers==$$version || exit 1; \
	  PYTHONPATH=$$own $(BIN)/pytest -n $(WORKERS) tests/test_per_layer.py tests/test_vllm.py -k 'not (caches_agree and bloom)' || exit 1; \
	done

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
