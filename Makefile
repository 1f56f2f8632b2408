# make help says what there is. Everything happens in a virtual environment that make sets up.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SUITE ?= portable
ARGS ?=

# The package and the compilation tests support these besides the environment's own Triton.
TRITONS := 3.6.0 3.9.0

# Waiting threads sleep. By default they spin, and where other programs want the same cores each
# parallel loop then waits for a time slice: 930 ms instead of 45 ms for a decoding step on two busy
# cores.
export OMP_WAIT_POLICY ?= passive

# What also runs in Triton's interpreter.
interpreted := $(patsubst %,tests/test_%.py,functions features triton_on_cpu backward)

# What one change in one place is likely to break, without processes that take long to start.
quick := $(patsubst %,tests/test_%.py,rules plan functions device_checks imports protocol refusals)

# mypy reads a stub file instead of the module beside it, unless the module is named.
stubbed := $(patsubst %.pyi,%.py,$(wildcard mini_flash_attention/*.pyi))

in_venv := $(VENV)/bin/python
make_env := $(PYTHON) tools/make_env.py $(VENV)

.DEFAULT_GOAL := help
.PHONY: help env demo train quick test compile bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## set up the environment and nothing else
	@$(make_env)

demo: env ## a language model answers prompts; arguments in ARGS='--prompt "Hello" --max-tokens 20'
	@$(in_venv) examples/generate.py $(ARGS)

train: env ## a small GPT learns this repository, twice: through this package and PyTorch; two minutes
	@$(in_venv) examples/train.py $(ARGS)

quick: env ## rules, plan, functions, refusals and a dozen calls in the interpreter; a minute
	OMP_NUM_THREADS=1 $(in_venv) -m pytest -n $(JOBS) --dist worksteal -q $(quick)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(in_venv) -m pytest -q -W ignore -m quick tests/test_features.py

test: ## lint, format, types and every test this machine can run; fifteen minutes
	@$(make_env) $(TRITONS:%=--triton %)
	$(in_venv) -m ruff check .
	$(in_venv) -m ruff format --check .
	$(in_venv) -m mypy
	$(in_venv) -m mypy $(stubbed)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(in_venv) -m pytest -n $(JOBS) --dist worksteal -q -W ignore $(interpreted)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=. $(in_venv) -W ignore tests/fuzz.py --cases 500 --device cpu --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(in_venv) -m pytest -n $(JOBS) --dist worksteal

compile: ## only the test that compiles every kernel for every architecture; no GPU, four minutes
	@$(make_env) $(TRITONS:%=--triton %)
	$(in_venv) -m pytest -n $(JOBS) --dist worksteal tests/test_compile.py

bench: env ## measure; SUITE=portable is the default
	$(in_venv) -m bench $(SUITE)

clean: ## remove the environment and all caches
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
