# Everything sets itself up: on a fresh machine with git, make and python >= 3.10, each target just works.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: help install train test lint clean

help:
	@echo "make train   train CLIP, then SPARC from it, on generated scenes; ends with a table and a picture"
	@echo "make test    run the tests"
	@echo "make lint    check style and formatting"
	@echo "make clean   remove the virtual environment (runs/ stays)"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("python >= 3.10 is needed, found " + sys.version.split()[0]) \
		if sys.version_info < (3, 10) else None'
	@echo "Installing into $(VENV), which takes some minutes the first time ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --quiet --editable '.[test]'
	@touch $@

train: $(STAMP)
	$(BIN)/python -m examples.digit_scenes

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
