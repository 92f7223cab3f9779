# Everything a newcomer or a CI machine runs. Each target makes and uses .venv by itself.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TYPED  := kernels engine export
SOURCES := pyproject.toml CMakeLists.txt constraints.txt \
	$(shell git ls-files "grounded_diffusion/*.py" kernels engine training export bench models)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs bench results gpu-test gpu-bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[dev]'
	@touch $@

demo: $(READY) ## export the shipped model and make pictures with masks in out/demo
	$(BIN)/gd-infer --prompts examples/prompts.txt --out out/demo --overwrite
	@echo "open out/demo/index.html"

test: $(READY) ## run the tests against the installed package
	$(BIN)/pytest -m 'not slow'

test-slow: $(READY) ## run the long tests: minutes and gigabytes
	$(BIN)/pytest -m slow

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV) grounded_diffusion/*.py $(TYPED:%=grounded_diffusion/%)
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cuh' '*.cu')

format: $(READY) ## repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cuh' '*.cu')

docs: $(READY) ## build the documentation's site into build/site; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

bench: $(READY) ## measure this machine's CPU against what one would use instead: ten minutes
	$(BIN)/gd-bench speed --no-memory --out bench/results

results: $(READY) ## write docs/results.md from the figures in bench/results/truth.json
	$(BIN)/gd-eval report

# A GPU machine has an environment of its own: its ONNX Runtime is another. TensorRT in full is not on PyPI everywhere.
GPU_VENV := .venv-gpu
GPU_READY := $(GPU_VENV)/.ready

$(GPU_READY): $(SOURCES)
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[test,cuda,rtx]'
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[tensorrt]' || \
		echo "without TensorRT, which pip did not find"
	@touch $@

gpu-test: ## on a machine with an NVIDIA GPU: install its backends and run the GPU tests; says so where there is none
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) $(GPU_READY) && $(GPU_VENV)/bin/python -P tests/gpu/run.py; \
	else echo "skipped: no NVIDIA GPU (nvidia-smi lists none)"; fi

gpu-bench: ## the same on an NVIDIA GPU; says so where there is none
	@if nvidia-smi -L >/dev/null 2>&1; then $(MAKE) $(GPU_READY) && $(GPU_VENV)/bin/gd-bench speed --backend cuda \
		--out bench/results; else echo "skipped: no NVIDIA GPU (nvidia-smi lists none)"; fi

clean: ## remove what the other targets made
	rm -rf $(VENV) $(GPU_VENV) build out
