# Each target sets up .venv by itself; the second time that is one comparison of dates.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNS ?= runs

.PHONY: help setup demo test coverage test-slow test-faults test-s3 gpu check format bench bench-model bench-order bench-loader bench-train bench-state bench-eval bench-data serve-mlflow clean

help:           ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

setup: $(READY)  ## a virtual environment with everything in it, DeepSpeed's small op built

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 (3.11 or newer) is needed"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m training.engine
	@touch $@

demo: $(READY)   ## the whole path on this machine: raw images -> a trained, measured, registered model -> a page
	$(BIN)/pixnerd run demo --store $(RUNS)/demo $(ARGS)

# Half of the time of both is waiting for Ray and for servers, so two processes share them, file by file.
test: $(READY)   ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Apart from `make test`: before Python 3.12 counting lines makes Python code 2.7 times as slow (reading the demo's recipe).
coverage: $(READY)  ## the share of each file's lines that the suite runs: make coverage ARGS='tests/infra'
	@mkdir -p build/coverage && rm -f build/coverage/counts*
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --timeout 900 $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

test-slow: $(READY)  ## faults and soaks: a whole workflow killed at every kind of stage, races, 100,000 downloads
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --timeout 1500 $(ARGS)

test-faults: $(READY)  ## training ranks that are killed, stopped and stuck, and a store that is away: minutes each
	$(BIN)/python -m pytest -m faults --timeout 1500 $(ARGS)

test-s3: $(READY)    ## the tests that want object storage, against a real radosgw
	$(BIN)/python -m tests.infra.radosgw -- $(BIN)/python -m pytest tests/infra/test_store.py tests/data_prep/test_prepare_s3.py \
		tests/orchestration/test_lease.py::test_the_same_on_a_real_server $(ARGS)

# A machine with a GPU need not have a network: what is installed there is taken, and what lacks is named.
gpu:            ## what needs a GPU, without Ray or a network: make gpu ARGS='--parts kernels,train256'
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -W ignore -m tests.gpu $(ARGS)

check: $(READY)  ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(READY)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the benchmarks, each printing its ratios side by side
	@for bench in $(filter-out %/bench_data.py %/bench_objectives.py,$(wildcard tests/bench/bench_*.py)); do echo "== $$bench"; $(BIN)/python -W ignore -m $$(basename $$bench .py | sed s/^/tests.bench./) || exit 1; done

bench-model: $(READY)  ## the network against the published one: make bench-model ARGS='--reference CHECKOUT'
	@$(BIN)/python -W ignore -m tests.bench.bench_model $(ARGS)

bench-order: $(READY)  ## what 16 ranks fetch of 45 million images, and when
	@$(BIN)/python -m tests.bench.bench_order $(ARGS)

LOADERS := build/loaders

bench-loader: $(READY) $(LOADERS)/.ready  ## the loader on one core, against webdataset, mosaicml-streaming and datago
	@$(LOADERS)/bin/python -W ignore -m tests.bench.bench_loader $(ARGS)

# They find torch and all else in $(VENV): without their dependencies, which ask for other versions of it.
$(LOADERS)/.ready: $(READY)
	$(PYTHON) -m venv $(LOADERS)
	$(LOADERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mosaicml-streaming==0.13.0 \
		datago==2026.10.1 Brotli python-snappy cramjam 'zstd<2' xxhash catalogue paramiko
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(LOADERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/all.pth
	@touch $@

bench-train: $(READY)  ## a training step of the demo's network, part by part: make bench-train ARGS='--device cuda'
	@$(BIN)/python -W ignore -m tests.bench.bench_train $(ARGS)

bench-state: $(READY)  ## what a commit costs the steps beside it, and what resuming ranks read
	@$(BIN)/python -W ignore -m tests.bench.bench_state $(ARGS)

bench-eval: $(READY)  ## pictures drawn, detected and asked about per second, batched against one by one
	@$(BIN)/python -W ignore -m tests.bench.bench_eval $(ARGS)
	@$(BIN)/python -W ignore -m tests.bench.bench_questions

IMG2DATASET := build/img2dataset

bench-data: $(READY) $(IMG2DATASET)/.ready  ## prepare against img2dataset: make bench-data ARGS='--photos FOLDER'
	@$(BIN)/python -m tests.bench.bench_data --img2dataset $(IMG2DATASET)/bin/python $(ARGS)

$(IMG2DATASET)/.ready:
	$(PYTHON) -m venv $(IMG2DATASET)
	$(IMG2DATASET)/bin/python -m pip install --quiet --disable-pip-version-check img2dataset==1.47.0
	@touch $@

serve-mlflow: $(READY)  ## MLflow's pages over the demo's database, on http://127.0.0.1:5000
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath $(RUNS))/demo/mlflow.db --host 127.0.0.1 --port 5000

clean:          ## everything that was made here, but not .venv
	rm -rf $(RUNS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
