# make demo | make test: the two commands. Both set up .venv and build first, and reuse what is set up.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait give their core away: beside other work, small operations are several times faster for it.
export OMP_WAIT_POLICY ?= passive
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cpu/kernels/*.h csrc/cpu/kernels/amx/*.h csrc/cuda/*)

.PHONY: help setup demo test test-slow check format docs bench bench-kernels gpu-check emulate-report clean
help:
	@echo "make demo       GreedyNAS on real images, some minutes on 2 cores; says where the report is"
	@echo "make test       the tests, with coverage"
	@echo "make test-slow  the tests that take longer"
	@echo "make check      ruff, mypy and clang-format"
	@echo "make docs       the documentation site, in site/; warnings are errors"
	@echo "make bench      evaluate_paths against PyTorch, on a quiet machine, most of an hour; bench/ has more"
	@echo "make bench-kernels  single operations beside plain torch, some minutes"
	@echo "make gpu-check  tests and times on this machine's GPU, in one file"
	@echo "make emulate-report  what can be known of the CUDA kernels without a GPU; needs nvcc and nvdisasm"

$(VENV)/.dependencies: requirements.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== setting up $(VENV) (torch is large: some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(NATIVE)
	@echo "== building greedynas_ext"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -m greedynas_ext.info --brief
	@touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/greedynas demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not alone" -n 2 --dist loadfile --no-loadscope-reorder --durations=15 --cov --cov-report=
	$(BIN)/python -m pytest -m "alone and not slow" --cov --cov-append --cov-report=term --cov-fail-under=90

test-slow: setup
	$(BIN)/python -m pytest -m slow --durations=15

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=python:bench:bench/gpu:tests/ext:tests/emulation $(BIN)/mypy $$(git ls-files 'bench/*.py' ':!bench/kernels' ':!bench/adapted_*')
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'bench/*.cpp' 'bench/*.h' 'bench/*.cu')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'bench/*.cpp' 'bench/*.h' 'bench/*.cu')

docs: $(VENV)/.dependencies
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: setup
	$(BIN)/python -m greedynas_ext.bench --eager --tuned-malloc --rounds 7 --output bench/results/tuned-malloc.json

bench-kernels: setup
	$(BIN)/python -m pytest bench/kernels --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,min,rounds

gpu-check: setup
	$(BIN)/python bench/gpu/gpu_check.py --output gpu-check.json

emulate-report: setup
	$(BIN)/python bench/gpu/emulate_report.py
	$(BIN)/python bench/gpu/gpu_model.py --output bench/results/emulated/modelled.json --markdown docs/gpu-model.md
	$(BIN)/python bench/gpu/roofline.py

clean:
	rm -rf build dist site *.egg-info greedynas_ext/*.so greedynas_ext/_build_info.json $(VENV)/.built
