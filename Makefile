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
.PHONY: help docs package demo demo-sentiment demo-translation recipes test coverage test-oldest test-latest lint format bench-overhead bench-drawing bench-generation \
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
		--max_new_tokens 24 --temperature 1.0 --bleu_tokenize char $(ARGS)
	$(BIN)/rsft-hf report outputs/demo/translation

RECIPE = HF_HUB_OFFLINE=1 $(BIN)/python recipes
FILES = --train_file $(DATA)/$(1)/train.jsonl --validation_file $(DATA)/$(1)/test.jsonl --disable_tqdm True
recipes: demo $(STAMP) ## every recipe, offline in small: 13 with the two demos
	$(RECIPE)/reward_model.py --output_dir outputs/demo/reward_model $(call FILES,dialogues) \
		--config_name $(DATA)/dialogues/reward_model --num_train_epochs 30 --learning_rate 2e-3
	$(RECIPE)/chatbot.py --output_dir outputs/demo/chatbot $(call FILES,dialogues) \
		--reward_model outputs/demo/reward_model --model_name_or_path $(DATA)/dialogues/chat_model \
		--num_train_epochs 4 --learning_rate 1e-3 --max_new_tokens 24 --lora_r 0
	$(RECIPE)/topic_classification.py --output_dir outputs/demo/topics $(call FILES,commands) \
		--config_name $(DATA)/commands/model --label_column intent --num_train_epochs 10 --learning_rate 1e-3 \
		--class_balanced True
	$(RECIPE)/token_classification.py --output_dir outputs/demo/slots $(call FILES,commands) \
		--config_name $(DATA)/commands/model --label_column tags --num_train_epochs 10 --learning_rate 1e-3
	$(RECIPE)/self_training.py --output_dir outputs/demo/self_training $(call FILES,commands) \
		--config_name $(DATA)/commands/model --label_column intent --num_per_class 8 --num_train_epochs 30 \
		--warmup_epochs 10 --learning_rate 1e-3
	$(RECIPE)/voice_assistant.py --output_dir outputs/demo/voice $(call FILES,commands) \
		--config_name $(DATA)/commands/parser --token_column tokens --tag_column tags --num_supervised 250 \
		--supervised_epochs 40 --num_train_epochs 3 --learning_rate 3e-3 --per_device_train_batch_size 16 \
		--max_new_tokens 48
	$(RECIPE)/image_classification.py --output_dir outputs/demo/digits --digits True --num_train_epochs 15 \
		--learning_rate 1e-3 --disable_tqdm True
	$(RECIPE)/question_answering.py --output_dir outputs/demo/facts $(call FILES,facts) \
		--config_name $(DATA)/facts/model --max_length 40 --doc_stride 16 --num_train_epochs 30 --learning_rate 2e-3
	$(RECIPE)/math_reasoning.py --output_dir outputs/demo/math $(call FILES,sums) \
		--model_name_or_path $(DATA)/sums/model --instruction "" --num_candidates 8 --max_new_tokens 64 \
		--num_train_epochs 10 --learning_rate 1e-3
	$(RECIPE)/summarization.py --output_dir outputs/demo/minutes $(call FILES,meetings) \
		--model_name_or_path $(DATA)/meetings/model --prefix "" --num_train_epochs 3 --learning_rate 1e-3 \
		--max_new_tokens 24 --temperature 1.0
	$(RECIPE)/simultaneous_translation.py --output_dir outputs/demo/wait_k \
		--train_file $(DATA)/numbers/train.csv --validation_file $(DATA)/numbers/test.csv --disable_tqdm True \
		--model_name_or_path $(DATA)/numbers/model --max_train_samples 300 --num_train_epochs 3 --learning_rate 3e-4 \
		--max_new_tokens 24 --bleu_tokenize char
	@test $$(ls recipes/*.py | wc -l) = 13 && test $$(ls outputs/demo/*/*.safetensors | wc -l) = 13 \
		&& echo "13 recipes, and 13 saved models in outputs/demo"

test: lint ## lint, then run every test and doctest, in WORKERS processes
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

coverage: $(STAMP) ## lines and branches of the package that the tests reach, those of subprocesses too
	$(BIN)/python -m pip install --quiet 'coverage>=7.10'
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(WORKERS) $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered

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
	rm -rf outputs build .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and by its exact version: asked for loosely, pip may choose a build for another accelerator.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
