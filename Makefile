# The two commands of the README are `make demo` and `make test`. Each makes .venv when it is
# missing, installs what it needs (the versions in constraints.txt), then runs.

PYTHON ?= python3
VENV ?= .venv

bin := $(VENV)/bin
# Byte code is written as modules are first imported: most of PyTorch's never are.
pip := $(bin)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt
base := $(VENV)/.stamp-base
demo := $(VENV)/.stamp-demo
dev := $(VENV)/.stamp-test
bench := $(VENV)/.stamp-bench

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-transformers test-torch gpu-test virtual mutants aot verify bench bench-train gpu-bench gpu-day gpu-bench-short gpu-bench-long \
        gpu-bench-mixed gpu-bench-speech gpu-bench-operations lint types docs format clean

help:
	@echo "make demo    transcribe the sample clips with the checkpoint that ships in the package"
	@echo "make test    run the tests (PYTEST_ARGS=... goes to pytest)"
	@echo "make test-transformers  only what drives transformers, also with the oldest and the newest one"
	@echo "make test-torch  what needs no Triton, with the oldest and the newest PyTorch (installs both)"
	@echo "make gpu-test  run the GPU tests, with the python on the path; nothing is installed"
	@echo "make virtual  the GPU tests without one: kernels compiled, then executed in NumPy; mutants (hours)"
	@echo "make mutants  kernels with one instruction changed, executed: which are noticed (an hour)"
	@echo "make aot     compile every Triton kernel for every target and check the machine code"
	@echo "make verify  prove the Triton kernels free of races, where a static verifier can (slow)"
	@echo "make bench   time this library and its peers side by side (BENCH_ARGS=...)"
	@echo "make bench-train  the same for training steps, forward and backward"
	@echo "make gpu-bench  the same on a GPU, with the python on the path; installs nothing"
	@echo "make gpu-day  nine minutes of a GPU: tests in bf16, main rows, the tuner; installs nothing"
	@echo "make lint    ruff: lint rules and formatting"
	@echo "make types   mypy, strict"
	@echo "make docs    build the documentation, with the API reference, into build/docs"
	@echo "make format  ruff: rewrite the files as lint wants them"
	@echo "make clean   remove .venv and everything that was built"
	@echo
	@echo "PYTHON=python3.12 make ...  makes .venv with that interpreter (3.10 or later; tests: 3.11)"

demo: $(demo)
	$(bin)/w2vbert-fast transcribe --model demo w2vbert_fast/demo/samples/*.flac

test: $(dev)
	$(bin)/python -m pytest $(PYTEST_ARGS)

# Not in .venv: on a machine with a GPU the Python that has the right PyTorch is on the path.
gpu-test:
	@python=$$(command -v python || command -v python3) || { echo "no python" >&2; exit 1; }; \
	    PYTHONPATH=. "$$python" -m tests.kernels $(PYTEST_ARGS)

# Part of `make test` as well.
test-transformers: $(dev)
	$(bin)/python -m pytest tests/integrations/test_transformers_range.py $(PYTEST_ARGS)

# Each in an environment of its own, of several GB. -oldest and -newest may be made alone.
test-torch: test-torch-oldest test-torch-newest

torch_tests := $(addprefix tests/,$(addsuffix .py,$(addprefix models/test_,models encode fast_path outputs tracing) \
    $(addprefix models/optimized/test_,packed int8) $(addprefix ops/test_,plain_forms cpu gradients) \
    processing/test_features checkpoints/test_checkpoint inference/test_offline cli/test_doctor \
    $(addprefix training/test_,training reference_trainer) integrations/test_pipelines \
    $(addprefix integrations/test_integration_,transformers transformers_guards transformers_use)))

# That transformers counts labels that hold the blank, and loads no optimiser's state with PyTorch 2.5. That
# Triton is too old for the kernels. That Dynamo traces neither that transformers' decorators nor the making of
# an output. Each is the beginning of names.
test-torch-oldest: deselected := $(foreach test, \
    models/test_models.py::test_ctc_loss_semantics[True \
    training/test_reference_trainer.py::test_a_run_is_taken_up_again_from_its_checkpoint \
    models/test_fast_path.py::test_a_layer_is_fourteen_launches_and_nothing_else \
    models/test_fast_path.py::test_around_the_layers_there_is_one_norm_one_work_list_and_one_copy_of_the_taps \
    models/test_tracing.py::test_a_record_of_an_accelerated_model_holds_for_other_masks[strict \
    integrations/test_integration_transformers_use.py::test_compiled[False] \
    models/test_outputs.py::test_compiled_models_return_outputs[True], \
    --deselect 'tests/$(test)')

test-torch-%: tests/torch_%.txt tests/torch_range.txt
	$(PYTHON) -m venv --clear build/torch-$*
	build/torch-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-compile \
	    -r $< -r tests/torch_range.txt
	PYTHONPATH=. build/torch-$*/bin/python -m pytest -p no:cacheprovider $(torch_tests) $(deselected) $(PYTEST_ARGS)

# The kernels compiled for both targets and executed in NumPy: every operation first, then all their
# tests, then mutants. Hours; a run that was cut goes on where it stopped. PYTEST_ARGS="-k test_norm"
# for a part.
virtual: $(dev)
	$(bin)/python -m tests.kernels --virtual sm_80 -k test_every_operation
	$(bin)/python -m tests.kernels --virtual sm_90 -k test_every_operation
	$(bin)/python -m tests.kernels --virtual sm_80 $(PYTEST_ARGS)
	$(bin)/python -m tests.kernels --virtual sm_90 $(PYTEST_ARGS)
	$(bin)/python -m tests.kernels --summary
	$(MAKE) mutants

# Ended and started again it goes on; MUTANTS_ARGS="--values 40" draws more of each kernel.
mutants: $(dev)
	$(bin)/python -m tests.mutants $(MUTANTS_ARGS)

aot: $(dev)
	$(bin)/python -m tools.compile

verify: $(dev)
	$(bin)/python -m tools.verify

bench: $(bench)
	$(bin)/python -m bench --out bench/results/cpu.json $(BENCH_ARGS)

bench-train: $(bench)
	$(bin)/python -m bench --workload "train 1x30s" --workload "train 8x1-20s" --budget 20 \
	    --out bench/results/cpu_train.json $(BENCH_ARGS)

# In steps, each far below the time that shared GPU machines give a command. Each may be run alone.
gpu-bench: gpu-bench-short gpu-bench-long gpu-bench-mixed gpu-bench-speech gpu-bench-operations

gpu_bench = python=$$(command -v python || command -v python3) || { echo "no python" >&2; exit 1; }; \
    PYTHONPATH=. timeout 470 "$$python" -m bench --device cuda $(BENCH_ARGS)

gpu-bench-short:
	@$(gpu_bench) --workload 1x10s --workload 1x30s --out bench/results/cuda_short.json

gpu-bench-long:
	@$(gpu_bench) --workload 1x60s --workload 1x300s --out bench/results/cuda_long.json

gpu-bench-mixed:
	@$(gpu_bench) --workload 16x1-20s --out bench/results/cuda_mixed.json

gpu-bench-speech:
	@$(gpu_bench) --workload "1x30s, layer 17" --workload 8x30s --workload "16x1-20s, demo" \
	    --out bench/results/cuda_speech.json

# A GPU that is lent for minutes: the tests in bf16 and the main rows of the two above, then the tuner.
gpu-day:
	@python=$$(command -v python || command -v python3) || { echo "no python" >&2; exit 1; }; \
	    PYTHONPATH=. "$$python" -m bench.gpu_day $(GPU_DAY_ARGS)

# The operations one by one, where pytest-benchmark is installed.
gpu-bench-operations:
	@python=$$(command -v python || command -v python3) || { echo "no python" >&2; exit 1; }; \
	    "$$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || \
	        { echo "PyTorch sees no CUDA device, nothing was measured" >&2; exit 2; }; \
	    if "$$python" -c "import pytest_benchmark" 2>/dev/null; then \
	        PYTHONPATH=. timeout 470 "$$python" -m pytest bench -q; \
	    else echo "pytest-benchmark is not installed: operations were not measured"; fi

lint: $(dev)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(dev)
	$(bin)/mypy

docs: $(dev)
	$(bin)/python -m sphinx -W --keep-going -q -b html docs build/docs

format: $(dev)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find csrc_triton w2vbert_fast tools tests bench examples -name __pycache__ -prune -exec rm -rf {} +

# A stamp is written only after its installation succeeded, so a broken one is repeated.
#
# PyTorch comes first and alone: an index may offer CPU and CUDA builds of one version, and what is
# installed by then is kept. The build backend comes along, so that the project itself installs
# without an isolated (unpinned) build environment.
$(base): constraints.txt
	@$(bin)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	        { echo "Python 3.10 or later is needed: PYTHON=python3.11 make ..." >&2; exit 1; }; \
	    echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(pip) torch hatchling
	@touch $@

$(demo): $(base) pyproject.toml
	$(pip) --quiet --no-build-isolation -e '.[audio,cli]'
	@touch $@

$(dev): $(base) pyproject.toml
	@$(bin)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "The tests need Python 3.11 or later (as transformers does):" \
	           "make clean, then PYTHON=python3.11 make test" >&2; exit 1; }
	$(pip) --quiet --no-build-isolation -e '.[all]'
	@touch $(demo) $@

$(bench): $(dev)
	$(pip) --quiet --no-build-isolation -e '.[all,bench]'
	@touch $@
