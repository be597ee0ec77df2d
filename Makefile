# Every target makes its own virtual environment in .venv and installs under the tested versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo quick test test-precision lint format docs benchmarks table curve clean

demo: $(CORE)             ## the whole line on the embedded model: no network, no GPU, results on one screen
	$(BIN)/litconvert demo

quick: $(INSTALLED)       ## all tests but those marked slow: under a minute and a half on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -m "not slow"

test: $(INSTALLED)        ## all tests, two at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

# What computes in bf16 or not, as the processor says: LITCONVERT_BF16=1 has it one way whatever the machine, 0 the other.
PRECISION := training distillation model/test_modeling_lit.py estimates runs evaluation sampling/test_draw.py cli \
	whole/test_emoji.py whole/test_whole_line.py checkpoints/test_distributed.py

test-precision: $(INSTALLED)  ## the tests whose precision depends on the processor
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(PRECISION:%=tests/%)

lint: $(INSTALLED)        ## lint, format check and the strict type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)      ## mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)        ## the documentation as a site in build/docs; a broken link is an error
	$(BIN)/python -m mkdocs build --strict

table: $(INSTALLED)       ## the tables and curves of docs/results.md: at most six hours on two cores, resumable
	$(BIN)/python -m benchmarks.digits_table

curve: $(INSTALLED)       ## the second teacher's curve and plots of docs/results.md: three hours on two cores, resumable
	$(BIN)/python -m benchmarks.curve emoji
	$(BIN)/python -m benchmarks.curve digits

benchmarks: $(INSTALLED)  ## start-up, conversion, a training step and its memory: an hour, and 30 GB of disk
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.full_size
	$(BIN)/python -m benchmarks.conversion
	$(BIN)/python -m benchmarks.core
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.memory

# Without the tools of development, which nobody needs to try it.
$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(INSTALLED): $(CORE)
	$(INSTALL) ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
