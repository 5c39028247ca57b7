# make demo: install, train and compare six mechanisms, write subquad-results/report.html
# make test: install, run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_MIXERS := full,local:window=17,longformer:window=17,linformer:rank=16,linear,performer:features=32

.PHONY: demo install test test-all lint

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[all,test]'
	touch $@

install: $(INSTALLED)

demo: install
	$(BIN)/subquad compare --task listops --preset quick --mixers $(DEMO_MIXERS)

test: install
	$(BIN)/python -m pytest -n 2

# the tests that need minutes, a browser or a C++ compiler; CI installs what they need
test-all: install
	$(BIN)/python -m pytest -n 2 -m 'slow or browser or compiler'

lint: install
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[all,test,lint]'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
