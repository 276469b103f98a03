# The same commands as .ci/run and CONTRIBUTING.md. Needs Python 3.11 or 3.12, pip and make.

PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: help quickstart quickstart-image quickstart-lora bench-quickstart check-gpu test-slow drill-cluster drill-jobs drill-train drill-prep test lint lines .venv

help:
	@echo 'make quickstart   clips, shards, training, samples and a report in runs/quickstart, in minutes on two cores'
	@echo 'make quickstart-image   the same with a given first frame, in runs/quickstart_image'
	@echo 'make quickstart-lora   after make quickstart: adapters teach its model a seventh colour, in runs/quickstart_lora'
	@echo 'make test         the tests'
	@echo 'make test-slow    the slow tests of all but prep: lost nodes, memory, checkpoints to keep'
	@echo 'make lint         ruff, pyright and the import rules'
	@echo 'make check-gpu    on a machine with a GPU: speed, MFU, numerics, compile, resume, memory, prep and train on it, in six minutes'
	@echo 'make bench-quickstart   after make quickstart: three training seeds, 192 clips each'
	@echo 'make drill-train  sora train under kills, lost nodes, poison, damage, full disks, and the quickstart: one table'
	@echo 'make drill-prep   sora prep killed at ten moments, driver, actors and writers in turn; memory over 1,000 clips'
	@echo 'make drill-cluster   half an hour of random faults over prep and train on three machines with addresses of their own'
	@echo 'make drill-jobs   three machines by cluster/README.md, a head node, submitted and stopped jobs, the Slurm script, every recipe in small, planted secrets'
	@echo 'make .venv        the environment alone, pinned by constraints.txt'

# The stamp is made last, so that an installation that was interrupted is taken up again.
.venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'no Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: .venv/installed
	$(BIN)/sora demo

quickstart-image: .venv/installed
	$(BIN)/sora demo --image

quickstart-lora: .venv/installed
	$(BIN)/sora demo --lora

bench-quickstart: .venv/installed
	$(BIN)/python -m tools.quickstart_seeds

# tests/drills/README.md describes the drills.
# Some of it: make drill-train ARGS='--only worker-killed node-lost'; --out FILE.md writes the table for docs/benchmarks.
drill-train: .venv/installed
	$(BIN)/python -m tests.drills.train $(ARGS)

# Some of it: make check-gpu ARGS='--only table train'. It writes a page in docs/benchmarks, or --out FILE.md.
check-gpu: .venv/installed
	$(BIN)/python -m tests.gpu.check $(ARGS)

# Shorter, with other faults, and with a page for docs/benchmarks: make drill-cluster ARGS='--minutes 6 --seed 3 --out FILE.md'
drill-cluster: .venv/installed
	$(BIN)/python -m tests.drills.cluster $(ARGS)

drill-prep: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/data_prep -m slow -rA

drill-jobs: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster tests/jobs -m slow -rA

# One thread a process, since tests start several processes at once. Tests run in JOBS processes, with 0 in this one.
JOBS ?= 2
test: export OMP_NUM_THREADS ?= 1
test: .venv/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/data_prep -m slow -rA

# Lines of the product by package, and files that are too long.
lines:
	$(BIN)/python -m tests.lines

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
