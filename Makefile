# Two commands: `make demo` and `make test`. Both need Python 3.11+, pip and make, and make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all lint clean

demo: $(VENV)/core
	$(BIN)/longlive generate "a large red star drifts right over a night sky" \
		"a large yellow star drifts right over a blue ocean" \
		"a large green circle bounces around over a field of snow" \
		--switch-at 5 10 --seconds 15 --output outputs/demo.mp4 --overwrite

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not slow"

test-all: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

lint: $(VENV)/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test: pyproject.toml $(VENV)/core
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache outputs build *.egg-info
