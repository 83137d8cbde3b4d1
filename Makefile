# Everything runs in .venv, which tests/setup.sh makes with python3, pip and gcc.
PYTEST = .venv/bin/python -m pytest
# Tests of the PTX emulator whose few lines of PTX a GPU can run as well.
SNIPPETS = arithmetic memory barriers matrix findings

.PHONY: demo check test emulator test-gpu sanitize bench bench-serve lint setup

demo:  ## write a tiny checkpoint, serve it with the plugin, ask it, stop
	@sh tests/setup.sh serve
	@.venv/bin/dsv4-moe demo

check: setup lint  ## lint, types, layering, unit tests: no server, no emulator, nothing slow
	@$(PYTEST) -q -m "not gpu and not slow" -n 2 --dist loadfile \
	  tests/test_layering.py tests/test_readme.py tests/kernels tests/adapter tests/commands

test: setup lint  ## everything that needs no GPU, but for what a workflow runs once a week
	@$(PYTEST) -m "not gpu and not weekly" -n 2 --dist loadfile

emulator: setup  ## the PTX emulator's own tests, and the kernels in it: a part of test
	@$(PYTEST) -m "not gpu" -n 2 --dist loadfile tests/emulator

test-gpu: setup  ## what needs a GPU (mostly compilation, hence processes); kept in test-gpu.json
	@OMP_NUM_THREADS=2 $(PYTEST) -m gpu -n 6 --dist loadgroup --gpu-results test-gpu.json
	@$(PYTEST) --silicon $(SNIPPETS:%=tests/emulator/test_emulator_%.py)

sanitize: setup  ## on a Hopper GPU: compute-sanitizer over the kernels; keeps JSON
	@PYTHONPATH=.:kernels .venv/bin/python tests/gpu/sanitize.py all

bench: setup  ## on a GPU: verify, then time, beside vLLM's own backends; keeps JSON and plot
	@cd kernels && for name in "layer run" "mxfp4 run" router rows overlap "load run"; do \
	  ../.venv/bin/python -m bench.$$name --out bench/results/$${name% run}.json || exit 1; done
	@cd kernels && ../.venv/bin/python -m bench.layer report bench/results/layer.json \
	  --plot bench/results/layer.svg
	@cd kernels && ../.venv/bin/python -m bench.mxfp4 report bench/results/mxfp4.json
	@cd kernels && ../.venv/bin/python -m bench.load report bench/results/load.json

bench-serve: setup  ## on a GPU: whole servers beside vLLM's experts; FORMAT=mxfp4 for those
	@cd kernels && ../.venv/bin/python -m bench.serve run --out bench/results/serve.json \
	  --format $(or $(FORMAT),nvfp4) --parts decodes steps prompts profile starts
	@cd kernels && ../.venv/bin/python -m bench.serve report bench/results/serve.json \
	  --plot bench/results/serve.svg
	@cd kernels && ../.venv/bin/python -m bench.serve report bench/results/serve.json --profile \
	  >bench/results/serve-profile.md

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy vllm_dsv4_moe kernels/dsv4_kernels kernels/bench

setup:
	@sh tests/setup.sh test
