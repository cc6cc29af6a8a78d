PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
# 1 makes it an error if the kernels cannot be compiled, as in CI; otherwise PyTorch's operations run instead of them.
export SB3_CYBORG_REQUIRE_KERNELS ?= 0

BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES_STAMP := .venv/.packages
KERNEL_SOURCES := sb3_cyborg/kernels/build.py $(wildcard sb3_cyborg/kernels/src/*)
# One thread per process: policies of this size run slower with several, and the tests run in $(WORKERS) processes.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
OFFICIAL := .venv-official/bin
OFFICIAL_STAMP := .venv-official/.installed
MINERL := .venv-minerl/bin
MINERL_STAMP := .venv-minerl/.installed
PEERS := .venv-peers/bin
PEERS_STAMP := .venv-peers/.installed
# Random cases are the same in each run, so that CI's result is that of the change; `make test-slow SEED=1` draws others.
SEED ?= 0
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --hypothesis-seed=$(SEED) $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-slow-short test-official test-cuda test-minerl docs pytest lint check-codestyle format type commit-checks bench bench-peers results pictures clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-16s %s\n", $$1, $$2 }'

venv: $(STAMP)  ## create .venv, install the package and its tools with the pinned versions, compile the kernels

# The build backends are installed first, with the versions of constraints.txt: hatchling for this package, setuptools for
# Crafter, which is a source archive (the setuptools of a new venv may be too old for it).
$(PACKAGES_STAMP): pyproject.toml constraints.txt hatch_build.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

# The installation compiles the kernels; this compiles them again when their sources have changed since.
$(STAMP): $(PACKAGES_STAMP) $(KERNEL_SOURCES)
	$(BIN)/python sb3_cyborg/kernels/build.py || test "$(SB3_CYBORG_REQUIRE_KERNELS)" = 0
	touch $@

demo: $(STAMP)  ## train MemoryPPO on a memory task and print its return (minutes)
	$(BIN)/python examples/demo_repeat_previous.py

test: $(STAMP)  ## all tests except the slow ones
	$(PYTEST) -m "not slow"

pytest: test  ## the same, with SB3's name

test-slow: $(STAMP)  ## only the slow tests: documentation's code, examples, RL Zoo's hyperparameters (minutes)
	$(PYTEST) --timeout=1800 -m slow

# Failures of ranks, groups of seeds, the export of every stack.
ENDURANCE := tests/test_rank_failures.py tests/test_seeds.py tests/test_export.py

test-slow-short: $(STAMP)  ## the slow tests except those that take very long, as in CI (minutes)
	$(PYTEST) --timeout=1800 -m slow $(ENDURANCE:%=--deselect=%)

test-official: $(OFFICIAL_STAMP)  ## Mamba-2 against its official kernels, interpreted on the CPU (minutes; an environment of 2 GB)
	$(ONE_THREAD) $(OFFICIAL)/python -m pytest tests/official -s $(PYTEST_ARGS)

# The build tools are installed first: mamba-ssm builds against the installed torch, here without its CUDA parts.
$(OFFICIAL_STAMP): requirements/test-official.txt requirements/mamba-ssm.txt constraints.txt
	test -x $(OFFICIAL)/python || $(PYTHON) -m venv .venv-official
	$(OFFICIAL)/python -m pip install --quiet --requirement requirements/test-official.txt
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(OFFICIAL)/python -m pip install --quiet --no-deps \
		--no-build-isolation --requirement requirements/mamba-ssm.txt
	touch $@

test-cuda: $(STAMP)  ## Mamba-2 on a GPU; without one, skips with the reason
	$(BIN)/python -m pytest tests/cuda $(PYTEST_ARGS)

test-minerl: $(MINERL_STAMP)  ## MineRL's adapter against MineRL itself, with a double of Minecraft (minutes; an environment of 1 GB)
	$(ONE_THREAD) $(MINERL)/python -m pytest tests/minerl -s $(PYTEST_ARGS)

# Without Minecraft (READTHEDOCS=1), and without dependencies: see requirements/minerl.txt. gym builds with the installed
# setuptools.
$(MINERL_STAMP): requirements/test-minerl.txt requirements/minerl.txt constraints.txt
	test -x $(MINERL)/python || $(PYTHON) -m venv .venv-minerl
	$(MINERL)/python -m pip install --quiet --requirement requirements/test-minerl.txt
	READTHEDOCS=1 $(MINERL)/python -m pip install --quiet --no-cache-dir --no-deps --requirement requirements/minerl.txt
	touch $@

docs: $(STAMP)  ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: $(STAMP)  ## check style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-codestyle: lint  ## the same, with SB3's name

format: $(STAMP)  ## correct the style in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP)  ## check types: package, tests, examples, benchmarks
	$(BIN)/mypy

commit-checks: format type lint  ## run before a commit

bench: $(STAMP)  ## measure speed against sb3-contrib's RecurrentPPO, costs and growth, into benchmarks/results (half an hour)
	$(ONE_THREAD) $(BIN)/python benchmarks/throughput.py
	$(ONE_THREAD) $(BIN)/python benchmarks/throughput.py --name width256 --width 256
	$(ONE_THREAD) $(BIN)/python benchmarks/throughput.py --name envs64 --n-envs 64 --batch-size 2048 --seq-len 64
	$(ONE_THREAD) $(BIN)/python benchmarks/throughput.py --name width256_envs64 --width 256 --n-envs 64 --batch-size 2048 --seq-len 64 \
		--env RepeatPreviousEasy --agents gru/none lstm/none mamba/none gru/ring gru/pmm
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/throughput.py --name threads2 --threads 2 \
		--env RepeatPreviousEasy --agents gru/none lstm/none mamba/none gru/ring gru/pmm
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.growth

bench-peers: $(PEERS_STAMP)  ## measure speed against skrl, tianshou and CleanRL's logic (minutes; an environment of 1 GB)
	$(ONE_THREAD) $(PEERS)/python -m benchmarks.peers

$(PEERS_STAMP): requirements/bench-peers.txt
	test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --requirement requirements/bench-peers.txt
	touch $@

results: $(STAMP)  ## write the table and the plots of the learning benchmark, from benchmarks/results/learning_*.csv
	$(BIN)/python -m benchmarks.learning_report

# Crafter trains for a quarter of an hour: its pictures are drawn only with CRAFTER=1. Those of growth, speed and learning are drawn
# from the measurements in benchmarks/results, which `make bench` and benchmarks/learning.py write.
pictures: $(STAMP) results  ## draw all pictures of README and documentation (minutes); CRAFTER=1 for those of Crafter as well
	$(BIN)/python docs/figures/burn_in.py
	$(BIN)/python -m benchmarks.pictures
	$(ONE_THREAD) $(BIN)/python -m benchmarks.trained_pictures $(if $(CRAFTER),--only demo inspect curves crafter)

clean:  ## remove build outputs and caches; .venv, .venv-official, .venv-minerl, .venv-peers and runs/ stay
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sb3_cyborg tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
