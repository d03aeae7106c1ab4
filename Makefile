# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Another torch:  make test TORCH="torch==2.11.0"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.PHONY: demo test slow docs setup typecheck smoke wheel gpu clean

# torch first, pinned: the CPU build where pip finds one; a range would take the newest, whatever it pulls.
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[triton]"
	touch $@

setup: $(BIN)/.installed

## Trains the example LLaMA full-rank and with grass on real text; prints a table, draws a picture.
demo: setup
	$(BIN)/python examples/compare.py

## Everything a change must pass: lint, format, types, tests.
test: setup typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

## The tests that `make test` leaves out: whole runs, benchmarks, four processes.
slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The passes are grass_fx.passes only once installed: types are checked on what users install.
typecheck: setup
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p grass_fx

## The documentation as a site, in site/docs/index.html; a warning is an error.
docs: setup
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs . site

## Every example, a few steps of each.
smoke: setup
	$(BIN)/python examples/pretrain.py --smoke
	$(BIN)/python examples/pretrain.py --smoke --dtype bfloat16 --accumulate 2 --checkpoint-activations --save runs/smoke.pt --every 3
	$(BIN)/python examples/compare.py --smoke
	$(BIN)/python examples/finetune.py --smoke
	$(BIN)/python examples/hf_trainer.py --smoke
	$(BIN)/python examples/recipes/finetune_hf.py --smoke
	$(BIN)/python examples/recipes/finetune_trl.py --smoke
	$(BIN)/torchrun --nproc-per-node 2 examples/recipes/finetune_fsdp2.py --smoke
	$(BIN)/python examples/lightning_module.py --smoke
	$(BIN)/python examples/inspect_graphs.py
	$(BIN)/python examples/selected_rows.py --smoke
	$(BIN)/python examples/run_notebook.py examples/story.ipynb
	$(BIN)/python -m grass_fx explain --model examples.llama:build --rank 0.125
	$(BIN)/python examples/which_card.py --gpus 8
	$(BIN)/python examples/benchmarks/step_time.py --smoke --profile runs/profile.txt
	$(BIN)/python examples/benchmarks/on_gpu.py --smoke --only tests step-1b-inputs \
		optimizer-step-block-16 memory-7b-in-16-gb host-overhead compile-time selected-mm
	$(BIN)/python examples/benchmarks/step_bytes.py --smoke
	$(BIN)/python examples/benchmarks/graph_bytes.py --smoke
	$(BIN)/python examples/benchmarks/embedding_memory.py --smoke
	$(BIN)/python examples/benchmarks/long_context.py --smoke
	$(BIN)/python examples/benchmarks/traffic.py --smoke --ways ddp data
	$(BIN)/python examples/benchmarks/scaling.py --smoke

## The source distribution, and the wheel made of it, which works in an empty environment.
wheel: setup
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	bash .ci/check-wheel dist/*.whl "$(TORCH)"

## Everything that is measured on a GPU, an hour; TORCH names a build of torch for it.
gpu: setup
	$(BIN)/python examples/benchmarks/on_gpu.py

clean:
	rm -rf $(VENV) build dist site *.egg-info
