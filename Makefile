# Everything a user runs, from a clean clone: only Python 3.10 or newer and make are needed.

PYTHON ?= python3
PROMPT ?= an avocado armchair
ARGS ?=
OUT ?= runs/toy
MINUTES ?=
SEED ?= 0
HASHES ?=
PY := .venv/bin/python

# The prompt travels in the environment, unexpanded, so that $$, quotes and apostrophes survive.
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sample test fuzz lint format train-toy bench bench-peers evaluate audit sbom lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

sample: .venv/runtime.stamp ## Sample images for PROMPT="an avocado armchair"; ARGS="--num-images 8" adds flags
	$(PY) sample.py "$$PROMPT" $(ARGS)

test: .venv/dev.stamp ## Run the tests; ARGS="tests/test_cli.py -x" runs some of them
	$(PY) -m pytest --numprocesses auto --dist loadfile $(ARGS)

fuzz: .venv/dev.stamp ## Run commands with damaged input, from SEED=0, for MINUTES; else 231 inputs
	PYTHONPATH=.:tests/support OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(PY) -m fuzz $(if $(MINUTES),--minutes $(MINUTES),--rounds 2) --seed $(SEED) $(ARGS)

lint: .venv/dev.stamp ## Check style, formatting, types and, after `make audit` ran once, the packages
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@if test -e .venv/tools; then $(MAKE) --no-print-directory audit; \
	else echo 'audit skipped: run make audit once to install pip-audit'; fi

audit: .venv/tools.stamp ## Look for known vulnerabilities of the pinned packages
	@if $(PY) -c 'import urllib.request as u; u.urlopen("https://pypi.org/pypi/pip/json", timeout=9)' \
		2>/dev/null; then .venv/tools/bin/pip-audit --no-deps --disable-pip -r constraints.txt; \
	else echo 'audit skipped: pypi.org cannot be reached'; fi

sbom: .venv/runtime.stamp .venv/tools.stamp ## Write the installed packages to dist/sbom.json (CycloneDX)
	mkdir -p dist
	.venv/tools/bin/cyclonedx-py environment --pyproject pyproject.toml \
		--output-file dist/sbom.json .venv

lock: .venv/tools.stamp ## Write the hashes of all packages but torch to locks/ again
	.venv/tools/bin/python -m pip install -q uv -c constraints.txt
	$(LOCK) pyproject.toml -o locks/runtime.txt
	echo '$(COMPARED)' | tr ' ' '\n' | $(LOCK) --no-deps - -o locks/compared.txt
	$(LOCK) pyproject.toml --extra dev -o locks/dev.txt

format: .venv/dev.stamp ## Format the code and fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

train-toy: .venv/runtime.stamp ## Train a model like the bundled one in OUT=runs/toy; the same command resumes
	PYTHON="$(PY)" OUT="$(OUT)" recipes/toy.sh

bench: .venv/runtime.stamp ## Measure the speed of sampling
	$(PY) benchmarks/sample.py --contenders dalle1 bundled $(ARGS)

bench-peers: .venv/dev.stamp ## Install the projects that benchmarks/train_*.py compare with
	$(PY) -m pip install --no-deps dalle-pytorch axial-positional-embedding \
		rotary-embedding-torch -c constraints.txt

evaluate: .venv/runtime.stamp ## Score the bundled model on Toybox
	$(PY) evaluate.py toybox $(ARGS)

clean: ## Remove .venv, caches and builds; trained models in runs/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The projects that tests compare with.
COMPARED = DALL-E open_clip_torch taming-transformers-rom1504 rudalle rudolph PyWavelets \
	dalle-pytorch axial-positional-embedding rotary-embedding-torch

# With HASHES=1, pip installs only files whose hashes are in locks/; torch is pinned by version.
hashed = $(PY) -m pip install torch -c constraints.txt && \
	$(PY) -m pip install --no-deps --require-hashes -r $(1) && \
	$(PY) -m pip install --no-deps --no-build-isolation -e .
UNHASHED = torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas \
	cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
	cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
LOCK = .venv/tools/bin/uv pip compile -q --universal --generate-hashes --python-version 3.10 \
	--no-annotate --no-header -c constraints.txt $(UNHASHED:%=--no-emit-package=%)

# A stamp is written last, so an install that fails or is interrupted starts again next time.
.venv/runtime.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo 'dalle1 needs Python 3.10 or newer: name one with make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'This Python has no venv module: install it (Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(if $(HASHES),$(call hashed,locks/runtime.txt),$(PY) -m pip install -e . -c constraints.txt)
	@touch $@

.venv/tools.stamp: .venv/runtime.stamp
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python -m pip install -q pip-audit cyclonedx-bom -c constraints.txt
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp
	$(if $(HASHES),$(call hashed,locks/dev.txt),$(PY) -m pip install -e '.[dev]' -c constraints.txt)
	@# --no-deps: they require torchvision and old packages, which the tests never import.
	$(PY) -m pip install --no-deps $(if $(HASHES),--require-hashes -r locks/compared.txt,$(COMPARED) -c constraints.txt)
	@touch $@
