# Every target sets up .venv by itself; ARGS is passed through, as in `make demo ARGS="--num_train_epochs 2"`.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
# A build for the CPU lies under this version on many machines; another accelerator wants its own.
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# No model or data set is fetched: what needs the hub says so at once instead of waiting for it.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Models this small gain nothing from a second thread, and wait long for one that another program holds.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help docs package demo demo-sentiment demo-translation recipes test test-oldest test-latest lint format bench-overhead bench-drawing bench-generation \
	bench-rounds check-gpu bench-store bench-crash experiments clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: demo-sentiment demo-translation ## both halves, offline, in minutes on a CPU

DATA := recipes/data
demo-sentiment: $(STAMP) ## the weighted half: a small sentiment classifier
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/imdb_sentiment.py --output_dir outputs/demo/sentiment \
		--config_name $(DATA)/reviews/model --train_file $(DATA)/reviews/train.csv \
		--validation_file $(DATA)/reviews/test.csv --num_train_epochs 10 --warmup_epochs 3 --learning_rate 5e-4 \
		--per_device_train_batch_size 32 $(ARGS)
	$(BIN)/rsft-hf report outputs/demo/sentiment --data $(DATA)/reviews/train.csv

demo-translation: $(STAMP) ## the generative half: a small translator of number words into German
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/translation.py --output_dir outputs/demo/translation \
		--model_name_or_path $(DATA)/numbers/model --train_file $(DATA)/numbers/train.csv \
		--validation_file $(DATA)/numbers/test.csv --num_train_epochs 4 --learning_rate 2e-3 \
		--max_new_tokens 24 --temperature 1.0 $(ARGS)
	$(BIN)/rsft-hf report outputs/demo/translation

recipes: demo $(STAMP) ## every recipe, offline: the demos, a reward model, and a chatbot rewarded by it
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/reward_model.py --output_dir outputs/demo/reward_model \
		--config_name $(DATA)/dialogues/reward_model --train_file $(DATA)/dialogues/train.jsonl \
		--validation_file $(DATA)/dialogues/test.jsonl --num_train_epochs 30 --learning_rate 2e-3
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/chatbot.py --output_dir outputs/demo/chatbot \
		--reward_model outputs/demo/reward_model --model_name_or_path $(DATA)/dialogues/chat_model \
		--train_file $(DATA)/dialogues/train.jsonl --validation_file $(DATA)/dialogues/test.jsonl \
		--num_train_epochs 4 --learning_rate 1e-3 --max_new_tokens 24 --lora_r 0

test: lint ## lint, then run every test and doctest, in WORKERS processes
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

OLDEST := .venv-oldest
test-oldest: ## the tests on the oldest versions that pyproject.toml promises, in an environment of their own
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==$(TORCH) packaging
	$(OLDEST)/bin/python .ci/lower_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[dev]'
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) $(ARGS)

LATEST := .venv-latest
test-latest: ## the tests on the newest versions that pip finds within the promised ranges
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet torch==$(TORCH)
	$(LATEST)/bin/python -m pip install --quiet -e '.[dev]' 'torch==$(TORCH)'
	$(LATEST)/bin/python -m pip freeze --exclude-editable > $(LATEST)/versions.txt
	$(LATEST)/bin/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply the formatter and the fixes of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## the site in build/site, from the documents and docstrings; runs the notebooks
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python .ci/docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in build/site: $(BIN)/python -m http.server --directory build/site"

package: ## wheel and sdist in dist/, checked, and installed without extras in an environment of its own
	PYTHON=$(PYTHON) TORCH=$(TORCH) bash .ci/release

bench-overhead: $(STAMP) ## cost of an epoch against plain Trainer
	$(BIN)/python benchmarks/overhead.py $(ARGS)

bench-drawing: $(STAMP) ## ten million draws against torch.randperm
	$(BIN)/python benchmarks/drawing.py $(ARGS)

bench-generation: $(STAMP) ## cost of generation against generate, generate_batch and TRL
	$(BIN)/python benchmarks/generation.py $(ARGS)

bench-rounds: $(STAMP) ## cost of a round of the experiments, by engine (RSFT_MODELS, RSFT_DATA)
	$(BIN)/python benchmarks/rounds.py $(ARGS)

check-gpu: $(STAMP) ## exactness and speed on one GPU, in six minutes; writes gpu.json
	$(BIN)/python benchmarks/gpu.py --json gpu.json $(ARGS)

bench-store: $(STAMP) ## a round of a million candidates: judged, encoded, exported
	$(BIN)/python benchmarks/store.py $(ARGS)

bench-crash: $(STAMP) ## 200 kills at random points, and what the resumed runs leave
	$(BIN)/python benchmarks/crash.py $(ARGS)

experiments: $(STAMP) ## the comparisons of arms on the built-in data, seeds 1 to 3
	$(BIN)/python -m experiments.sentiment --dataset builtin --seeds 1 2 3 --output_dir outputs/experiments/sentiment $(ARGS)
	$(BIN)/python -m experiments.translation --dataset builtin --seeds 1 2 3 --output_dir outputs/experiments/translation $(ARGS)

clean: ## remove outputs and caches, keep .venv
	rm -rf outputs build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and by its exact version: asked for loosely, pip may choose a build for another accelerator.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
