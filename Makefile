# Everything sets itself up: on a fresh machine with git, make and python >= 3.10, each target just works.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# The lower ends of the ranges in pyproject.toml. Best with the oldest Python too: make test-oldest PYTHON=python3.10
OLDEST := torch==2.6.0 torchvision==0.21.0 open_clip_torch[training]==3.0.0 einops==0.8.0
# What of the tests meets open_clip; its main branch changes nothing for the others.
MAIN_TESTS := $(addprefix tests/,open_clip_4 plugins hooks monitoring embeddings losses regions show test_train.py test_train_baselines.py test_train_regions.py test_patches.py test_diagnostics.py)

.PHONY: help install train study downstream quick test test-all test-oldest test-main open-clip-checkout fuzz bench docs lint clean

help:
	@echo "make train   train CLIP, then SPARC from it, on generated scenes; ends with a table, a picture and a page"
	@echo "make study   compare every objective on the same scenes; about 80 minutes on 2 cores, and it can be stopped"
	@echo "make downstream  detect and caption with backbones of the study; up to 60 minutes on 2 cores, and it can be stopped"
	@echo "make quick   run the tests that start no process and train nothing; about a minute"
	@echo "make test    run every test that guards a behaviour of its own; about 10 minutes on 2 cores"
	@echo "make test-all  also the exhaustive ones: all 144 models, every golden case on every path"
	@echo "make bench   measure what the fine-grained loss costs; minutes"
	@echo "make fuzz    hold the loss against its slow reference in 20,000 random cases"
	@echo "make test-oldest  run the tests with the oldest torch and open_clip that are claimed"
	@echo "make test-main OPEN_CLIP=path  run what touches open_clip with a checkout of its main branch"
	@echo "make docs    build the documentation into build/site"
	@echo "make lint    check style and formatting"
	@echo "make clean   remove the virtual environments (runs/ stays)"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("python >= 3.10 is needed, found " + sys.version.split()[0]) \
		if sys.version_info < (3, 10) else None'
	@echo "Installing into $(VENV), which takes some minutes the first time ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --quiet --editable '.[test,docs]'
	@touch $@

train: $(STAMP)
	$(BIN)/python -m examples.scenes

study: $(STAMP)
	$(BIN)/python -m examples.study

downstream: $(STAMP)
	$(BIN)/python -m examples.downstream

quick: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto -m "not slow and not exhaustive" --hypothesis-profile quick

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto -m "not exhaustive"

test-all: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto

bench: $(STAMP)
	$(BIN)/python -m examples.benchmark

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --cases 20000

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest --numprocesses auto

# The sources come before the installed release, with which some tests compare.
test-main: open-clip-checkout $(STAMP)
	PYTHONPATH='$(abspath $(OPEN_CLIP))/src' $(BIN)/python -m pytest --numprocesses auto $(MAIN_TESTS)

open-clip-checkout:
	@test -f '$(OPEN_CLIP)/src/open_clip_train/main.py' || \
		{ echo "OPEN_CLIP is '$(OPEN_CLIP)'; expected a checkout of open_clip: make test-main OPEN_CLIP=path"; exit 1; }

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --progress-bar off --quiet --editable '.[test]' $(foreach each,$(OLDEST),'$(each)')
	@touch $@

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest
