"""A chatbot that learns from its own best answers, four ways: base, supervised, rejection, and a random control.

    python recipes/reward_model.py --half a --output_dir outputs/reward_model_a
    python recipes/reward_model.py --half b --output_dir outputs/reward_model_b
    python recipes/chatbot.py                      # OpenRL/daily_dialog, Qwen2.5 0.5B Instruct: wants a GPU

    python recipes/chatbot.py --dataset $RSFT_DATA/dailydialog_pp --model_name_or_path $RSFT_MODELS/dailydialog-chat \\
        --eval_split dev --reward_model $RM_A --judge_model $RM_B --encoder $ENCODER --max_prompt_length 192 \\
        --max_new_tokens 32 --max_train_contexts 512 --max_eval_contexts 128 --max_test_contexts 400 \\
        --learning_rate 3e-4

The third answers multi-turn dialogues, five to fifteen minutes for a run that generates, on one CPU core. The first
reward model selects, the second only judges; they are trained on disjoint contexts. Every option of TrainingArguments
is an option here, whose epochs are rounds; `--config my.yaml` reads them from a file, the command line wins.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# So that `python recipes/chatbot.py` finds the files beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from recipes.chat_data import ChatPrompts, load_prompts, supervised_rows
from recipes.chat_measures import ResponseMeter, RoundCurve, curve
from recipes.chat_report import describe, draw_rounds, samples_of, write_samples
from recipes.chat_rewards import ChatRewardArguments, load_judge, selecting_functions
from recipes.common import RecipeError, option, parse_arguments
from recipes.dialogue import sample_rows
from recipes.generative_arms import (
    GenerativeArmArguments,
    arguments_of_run,
    make_resampler,
    open_folders,
    supervised_schedule,
)
from recipes.generative_report import collect_rounds, write_report
from rsft_hf import RejectionSamplingTrainer
from rsft_hf.generative.encoding import RowCollator
from rsft_hf.rewards.functions import RewardFunctions

NUM_PRINTED = 3
GREEDY = ("held_out_reward", "selecting_reward", "distinct_2", "words")  # of the greedy responses too


@dataclass
class ChatArguments(ChatRewardArguments):
    """Which dialogues and which model, and what selects and judges."""

    dataset: str = option("OpenRL/daily_dialog", "Hub name, file, or folder of files named by split.")
    model_name_or_path: str = option(
        "Qwen/Qwen2.5-0.5B-Instruct", "Hub name or folder of a model with a chat template."
    )
    train_split: str = option("train", "Split whose contexts are trained on.")
    eval_split: str = option("validation", "Split for the curves, and for choosing options.")
    test_split: str = option("test", "Split measured once, at the end.")
    max_train_contexts: int | None = option(2000, "Train on so many contexts, chosen by the seed.")
    max_eval_contexts: int | None = option(200, "Contexts of the curves, the same for every seed.")
    max_test_contexts: int | None = option(None, "Contexts of the final figures, the same for every seed.")
    measured_temperature: float = option(1.0, "Temperature of the responses that are measured.")
    max_turns: int = option(7, "Turns of a context that are read; with an odd number the user begins a cut one.")
    max_prompt_length: int = option(384, "Contexts of more tokens are left out.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_train_contexts", "max_eval_contexts", "max_test_contexts", "max_turns", "max_prompt_length"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise RecipeError(f"`--{name}` {vars(self)[name]} must be at least 1.")
        if self.measured_temperature <= 0:
            raise RecipeError(f"`--measured_temperature` {self.measured_temperature} must be above 0.")


@dataclass
class ChatTrainingArguments(TrainingArguments):
    """Every option of TrainingArguments, with the defaults of this recipe."""

    output_dir: str = option("outputs/chatbot", "Folder of the runs, tables and pictures.")
    per_device_train_batch_size: int = option(16, "Rows per step and device.")
    learning_rate: float = option(1e-5, "Peak of the learning rate.")
    num_train_epochs: float = option(4.0, "Rounds.")
    logging_strategy: str = option("epoch", "When to log.")
    save_strategy: str = option("epoch", "When to save; a killed run goes on from its last checkpoint.")
    save_total_limit: int | None = option(1, "Checkpoints that are kept.")
    disable_tqdm: bool | None = option(True, "Print a line for each round instead of bars and logs.")


def load(kind: Any, name: str) -> Any:
    """Returns the model or tokenizer of a name."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`--model_name_or_path` {name!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name."
        ) from error


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer of a chat model."""
    tokenizer = load(AutoTokenizer, name)
    if tokenizer.chat_template is None:
        raise RecipeError(f"`--model_name_or_path` {name!r} has no chat template. Name a model tuned for chat.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def make_trainer(arm: str, prompts: Dataset, resampler: Any, common: dict[str, Any], num_draws: int) -> Trainer:
    """Returns the trainer of an arm; they differ in the rows that they train on."""
    tokenizer = common["processing_class"]
    common |= {"data_collator": RowCollator(tokenizer.pad_token_id)}
    if arm == "supervised":
        common["args"] = supervised_schedule(common["args"], num_draws)
        trainer = Trainer(**common, train_dataset=supervised_rows(prompts, tokenizer))
    else:
        trainer = RejectionSamplingTrainer(**common, train_dataset=prompts, resampler=resampler)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_arm(trainer: Trainer, checkpoint: str | None, folder: Path) -> dict[str, Any]:
    """Returns what there is to report of the training of an arm, after it."""
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - began
    trainer.save_model(str(folder / "model"))
    history = trainer.state.log_history
    # The clock of a resumed run has seen its last part only.
    costs = {"steps": trainer.state.global_step, "seconds": None if checkpoint else seconds}
    return {"costs": costs, "by_round": curve(history), "rounds": collect_rounds(history)}


def make_meters(
    options: ChatArguments, prompts: ChatPrompts, tokenizer: Any, selecting: RewardFunctions, max_new_tokens: int
) -> tuple[ResponseMeter, ResponseMeter]:
    """Returns what measures after every round, and what measures at the end."""
    judge = load_judge(options)
    sampling = GenerationConfig(
        temperature=options.measured_temperature, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens
    )
    rows = prompts.watched, prompts.reported
    return tuple(ResponseMeter(one, tokenizer, selecting, judge, sampling) for one in rows)


def measure_arm(report: ResponseMeter, model: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Returns the final figures of a model, responses to read, and the curve for the common report."""
    responses, greedy = report(model), report(model, is_greedy=True).metrics
    dialogues = samples_of(report.prompts, responses)
    return {
        "metrics": responses.metrics | {f"greedy_{name}": greedy[name] for name in GREEDY} | result["costs"],
        "curve": [[one["round"], one["held_out_reward"]] for one in result["by_round"]],
        "dialogues": dialogues,
        "samples": dialogues[:NUM_PRINTED],
    }


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Runs every arm with every seed, writes the report, and returns the results."""
    types = (ChatArguments, GenerativeArmArguments, ChatTrainingArguments)
    options, arms, training = parse_arguments(types, argv, description=__doc__.splitlines()[0])

    # 1. Data: the prompts of a seed are the same for all its arms, the held-out contexts for all seeds.
    tokenizer = load_tokenizer(options.model_name_or_path)
    prompts = load_prompts(options, tokenizer)
    chosen = {seed: sample_rows(prompts.train, options.max_train_contexts, seed) for seed in arms.seeds}
    # 2. Measures: rewards that select, one that does not, diversity and length; the curve is not that of the report.
    functions, weights = selecting_functions(options)
    watch, report = make_meters(options, prompts, tokenizer, RewardFunctions(functions, weights), arms.max_new_tokens)
    for scorers in (watch.selecting, watch.judge):
        scorers.to(training.device)
    folders = open_folders(options, arms, training)

    results: list[dict[str, Any]] = []
    for (arm, seed), folder in folders.items():
        name, result = f"{arm}, seed {seed}", folder.result()
        print(f"{name}: {folder.status()}", flush=True)
        if result is None:
            # 3. Model: every arm starts from the same weights.
            model = load(AutoModelForCausalLM, options.model_name_or_path).to(training.device)
            result = {"arm": arm, "seed": seed, "costs": {"steps": 0, "seconds": 0.0}, "rounds": []}
            if arm == "base":
                result["by_round"] = [{"round": 0, **watch(model).metrics}]
            else:
                # 4. Trainer: supervised a plain one, the other two differ in their rule of acceptance.
                args = arguments_of_run(training, folder.path, seed)
                num_draws = arms.num_draws or len(chosen[seed])
                watching = RoundCurve(watch, num_draws, name)
                common = {"model": model, "args": args, "processing_class": tokenizer, "callbacks": [watching]}
                resampler = make_resampler(arms, arm, functions, reward_weights=weights)
                trainer = make_trainer(arm, chosen[seed], resampler, common, num_draws)
                result |= train_arm(trainer, folder.checkpoint(), folder.path)
            # 5. Measurement: the same for every arm.
            result |= measure_arm(report, model, result)
            folder.finish(result, is_writer=training.process_index == 0)
        results.append(result)

    # 6. Report: tables, pictures, responses to read, and what the seeds allow one to say.
    if training.process_index == 0:
        output, described = Path(training.output_dir), describe(options, report)
        draw_rounds(results, output / "rounds.png")
        write_samples(results, output / "samples.md", described.title)
        write_report(results, output, described)
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
