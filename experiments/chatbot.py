"""A chatbot that learns from its own best answers, four ways: base, supervised, rejection, and a random control.

    python -m experiments.reward_model --half a --output_dir outputs/reward_model_a
    python -m experiments.reward_model --half b --output_dir outputs/reward_model_b
    python -m experiments.chatbot                      # OpenRL/daily_dialog, Qwen2.5 0.5B Instruct: wants a GPU

    python -m experiments.chatbot --dataset $RSFT_DATA/dailydialog_pp \\
        --model_name_or_path $RSFT_MODELS/dailydialog-chat --eval_split dev \\
        --reward_model $RM_A --judge_model $RM_B --encoder $ENCODER --max_prompt_length 192 \\
        --max_new_tokens 32 --max_train_contexts 512 --max_eval_contexts 128 --max_test_contexts 400 \\
        --learning_rate 3e-4

The third answers multi-turn dialogues, five to fifteen minutes for a run that generates, on one CPU core. The first
reward model selects, the second only judges; they are trained on disjoint contexts. Every option of TrainingArguments
is an option here, whose epochs are rounds; `--config my.yaml` reads them from a file, the command line wins.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from experiments.chat_data import (
    REFERENCES,
    ChatPrompts,
    ChatRewardArguments,
    ResponseMeter,
    Responses,
    RoundCurve,
    curve,
    load_judge,
    load_prompts,
    sample_rows,
    selecting_functions,
    supervised_rows,
)
from experiments.harness.arguments import ExperimentError, option, parse_arguments
from experiments.harness.arms import GenerativeArmArguments, make_candidate_resampler, supervised_schedule
from experiments.harness.reporting import (
    COLOURS,
    GenerativeReport,
    Result,
    collect_rounds,
    write_generative_report,
)
from experiments.harness.runs import arguments_of_run, open_folders
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
                raise ExperimentError(f"`--{name}` {vars(self)[name]} must be at least 1.")
        if self.measured_temperature <= 0:
            raise ExperimentError(f"`--measured_temperature` {self.measured_temperature} must be above 0.")


@dataclass
class ChatTrainingArguments(TrainingArguments):
    """Every option of TrainingArguments, with the defaults of this experiment."""

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
        raise ExperimentError(
            f"`--model_name_or_path` {name!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name."
        ) from error


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer of a chat model."""
    tokenizer = load(AutoTokenizer, name)
    if tokenizer.chat_template is None:
        raise ExperimentError(f"`--model_name_or_path` {name!r} has no chat template. Name a model tuned for chat.")
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


NUM_SAMPLES = 12

COMPARED = ("held_out_reward", "selecting_reward", "chrf", "distinct_1", "distinct_2",
            "unique_responses", "words", "greedy_held_out_reward", "greedy_distinct_2")  # fmt: skip

# What a round is drawn by: the reward that selects may rise while the one that only judges does not.
PANELS = {
    "held_out_reward": "held-out reward",
    "selecting_reward": "selecting reward",
    "distinct_2": "distinct-2",
    "words": "words per response",
}


def samples_of(prompts: Dataset, responses: Responses) -> list[dict[str, Any]]:
    """Returns responses to a few contexts, spread over all and the same for every arm."""
    step = max(1, len(prompts) // NUM_SAMPLES)
    return [
        {
            "turns": [message["content"] for message in prompts[row]["prompt"]],
            "prompt": prompts[row]["prompt"][-1]["content"],
            "reference": prompts[row][REFERENCES][0],
            "output": responses.texts[row],
            "held_out_reward": responses.judged[row],
        }
        for row in range(0, len(prompts), step)[:NUM_SAMPLES]
    ]


def describe(options: Any, meter: ResponseMeter) -> GenerativeReport:
    """Returns what the report says beside the figures, among it what the judge makes of human responses."""
    references = meter.prompts[REFERENCES]
    human = meter.rate([texts[0] for texts in references]).metrics
    strangers = meter.rate([references[row - 1][0] for row in range(len(references))]).metrics
    return GenerativeReport(
        title=f"{Path(options.dataset).name}, {Path(options.model_name_or_path).name}",
        compared=COMPARED,
        curve_label=f"held-out reward, {options.eval_split}",
        notes=(
            f"Responses to {len(references)} contexts of `{options.test_split}`, one each, sampled at temperature "
            f"{options.measured_temperature:g} from the same random streams for every arm. The held-out reward selects "
            f"nothing. It gives people's own responses {human['held_out_reward']:.3f} and those to another context "
            f"{strangers['held_out_reward']:.3f}; people's distinct-2 is {human['distinct_2']:.3f}, their length "
            f"{human['words']:.1f} words.",
            "`seconds` is the time of training with generation and with the curve. rounds.png has the figures of every "
            f"round on `{options.eval_split}`, samples.md responses to read.",
        ),
    )


def write_samples(results: Sequence[Result], path: Path, title: str) -> None:
    """Writes the responses of every arm of the first seed to the same contexts, with what the judge says of each."""
    seed = results[0]["seed"]
    runs = [result for result in results if result["seed"] == seed]
    lines = [f"# {title}", "", f"Held-out contexts, sampled responses, seed {seed}; in brackets the held-out reward."]
    for number, sample in enumerate(runs[0]["dialogues"]):
        lines += ["", f"## Context {number + 1}", "", *(f"- {turn}" for turn in sample["turns"]), ""]
        lines += ["| | response | |", "|---|---|---|", _row("human", sample["reference"], None)]
        for run in runs:
            found = run["dialogues"][number]
            lines.append(_row(run["arm"], found["output"], found["held_out_reward"]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, text: str, reward: float | None) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return f"| {name} | {shown} | {'' if reward is None else f'[{reward:.2f}]'} |"


def draw_rounds(results: Sequence[Result], path: Path) -> None:
    """Writes one panel per figure over the rounds: a thin line for each seed, a thick one for their mean."""
    figure = Figure(figsize=(4 * len(PANELS), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(PANELS))
    for axes, (name, label) in zip(all_axes, PANELS.items(), strict=True):
        for arm in dict.fromkeys(result["arm"] for result in results):
            curves = [[entry[name] for entry in result["by_round"]] for result in results if result["arm"] == arm]
            mean = np.mean(curves, axis=0)
            if len(mean) == 1:
                axes.axhline(mean[0], color=COLOURS[arm], linestyle=":", label=arm)
                continue
            for values in curves:
                axes.plot(range(len(values)), values, color=COLOURS[arm], linewidth=0.7, alpha=0.5)
            axes.plot(range(len(mean)), mean, color=COLOURS[arm], linewidth=2.2, label=arm)
        axes.set(xlabel="round", title=label)
    all_axes[0].legend()
    figure.savefig(path, dpi=140)


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
                resampler = make_candidate_resampler(arms, arm, functions, reward_weights=weights)
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
        write_generative_report(results, output, described)
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ExperimentError as error:
        sys.exit(f"error: {error}")
