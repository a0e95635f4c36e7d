# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
ORACLE := .oracle
ORACLE_GGUF := .oracle-gguf
PEERS := .peers
LLAMA := .llama
BUNDLE := .bundle
BIN := $(VENV)/bin
NODES := tests/e2e/node_modules
# Where torch comes from; elsewhere on Linux the plain index gives a CUDA build:
#   make oracle TORCH_INDEX=--index-url=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# How llama.cpp is built for comparisons of numbers: for no particular processor, since one built natively crashed elsewhere.
LLAMA_CMAKE ?= -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
MODEL ?= smollm2-135m-instruct
PORT ?= 8765
# The command line of desktop bundles, from npm.
MCPB := @anthropic-ai/mcpb@2.1.2

.PHONY: help demo test e2e lint format serve mutants oracle oracle-fast oracle-gguf bench overhead dockerfile bundle docs snapshot clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1	/' | expand -t 14

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

$(ORACLE)/.ready: pyproject.toml
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(ORACLE)/bin/python -m pip install --quiet $(TORCH_INDEX) torch==2.13.0
	$(ORACLE)/bin/python -m pip install --quiet --editable . --group oracle
	touch $@

$(ORACLE_GGUF)/.ready: pyproject.toml
	$(PYTHON) -m venv $(ORACLE_GGUF)
	$(ORACLE_GGUF)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	CMAKE_ARGS="$(LLAMA_CMAKE)" $(ORACLE_GGUF)/bin/python -m pip install --quiet --editable . --group oracle-gguf
	touch $@

demo: $(VENV)/.ready  ## fetch the default model, start the server and drive it through one investigation
	MECHSCOPE_FAST=no $(BIN)/mechscope demo --model $(MODEL)

test: $(VENV)/.ready  ## run the tests
	$(BIN)/mechscope fetch smollm2-135m-instruct
	$(BIN)/pytest -n 2 -m "not e2e"

$(NODES)/.ready: tests/e2e/package.json tests/e2e/package-lock.json
	npm ci --prefix tests/e2e --loglevel=error
	touch $@

e2e: $(VENV)/.ready $(NODES)/.ready  ## other people's clients, conformance, fuzzing, load and soak (minutes; needs npm)
	$(BIN)/pytest -n 2 --dist loadfile -m e2e --ignore tests/e2e/test_load.py
	$(BIN)/pytest -m e2e tests/e2e/test_load.py

lint: $(VENV)/.ready  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: $(VENV)/.ready  ## break the code in named ways; every mutant must be caught by the tests
	$(BIN)/mechscope fetch smollm2-135m-instruct
	PYTHONPATH=. $(BIN)/python tests/mutants.py

oracle: $(ORACLE)/.ready  ## compare with transformers and torch on the same weights
	$(ORACLE)/bin/mechscope fetch smollm2-135m-instruct
	MECHSCOPE_FAST=no OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests $(ORACLE)/bin/python -m oracle.run $(ORACLE_ARGS)

oracle-fast: $(ORACLE)/.ready  ## the same for the compiled kernels of the fast extra
	$(ORACLE)/bin/mechscope fetch smollm2-135m-instruct
	MECHSCOPE_FAST=yes OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests $(ORACLE)/bin/python -m oracle.run $(ORACLE_ARGS)

oracle-gguf: $(ORACLE_GGUF)/.ready  ## compare GGUF files and tokenizers with llama.cpp (builds it: minutes)
	OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests $(ORACLE_GGUF)/bin/python -m oracle.llama_cpp $(ORACLE_ARGS)

$(PEERS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(PEERS)/bin/python -m pip install --quiet $(TORCH_INDEX) torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --group peers
	touch $@

$(LLAMA)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(LLAMA)/bin/python -m pip install --quiet --group oracle-gguf
	touch $@

bench: $(VENV)/.ready $(PEERS)/.ready $(LLAMA)/.ready  ## time mechscope against its peers (an hour; needs a quiet machine)
	PYTHONPATH=. $(BIN)/python bench/model.py bench/.model
	PYTHONPATH=. $(BIN)/python bench/run.py --peers $(PEERS)/bin/python --llama $(LLAMA)/bin/python --model bench/.model $(BENCH_ARGS)

overhead: $(VENV)/.ready  ## time what hooks and the protocol add (minutes; needs a quiet machine)
	MECHSCOPE_FAST=no PYTHONPATH=. $(BIN)/python bench/overhead.py

dockerfile: $(VENV)/.ready  ## follow the Dockerfile in an empty directory, without Docker
	$(BIN)/python tests/dockerfile.py MODEL=$(MODEL)

$(BUNDLE)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(BUNDLE)
	$(BUNDLE)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BUNDLE)/bin/python -m pip install --quiet --group bundle
	npm install --silent --prefix $(BUNDLE) $(MCPB)
	touch $@

bundle: $(VENV)/.ready $(BUNDLE)/.ready  ## build and try dist/mechscope.mcpb for desktop hosts (needs Node)
	$(BIN)/python deploy/bundle.py $(BUNDLE)/node_modules/.bin/mcpb
	PATH=$(abspath $(BUNDLE)/bin):$$PATH $(BIN)/python tests/bundle.py $(BUNDLE)/node_modules/.bin/mcpb dist/mechscope.mcpb

docs: $(VENV)/.ready  ## write the generated documentation
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/run.py

snapshot: $(VENV)/.ready  ## accept the present list of tools as the contract
	$(BIN)/python tests/server/snapshot.py

serve: $(VENV)/.ready  ## serve MCP over HTTP on localhost
	$(BIN)/mechscope serve --http --port $(PORT)

clean:  ## remove environments and caches
	rm -rf $(NODES) $(VENV) $(ORACLE) $(ORACLE_GGUF) $(PEERS) $(LLAMA) $(BUNDLE) bench/.model dist .pytest_cache .mypy_cache .ruff_cache
