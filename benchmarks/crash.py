"""Kills training runs at random points, resumes them, and compares all they leave with runs that were never killed.

    make bench-crash                        # or: make bench-crash ARGS="--num_kills 24 --json -"

A weighted run (losses from a scoring pass, losses from training steps) and a generative one (two attempts, duplicates
across rounds, dropout on). Half of the kills fall at a random time; the other half at a random write (a file opened for
writing, moved or removed), counted from the start of training, so that checkpoints and candidates are cut off in the
middle. SIGKILL and SIGTERM alternate. A run is killed one to three times, then it ends: weights, drawn rows, losses,
history, logged figures, candidates and verdicts must be equal bit for bit, but for durations.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from measures import build_parser, write_json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

from rsft_hf import CandidateResampler, LossResampler, RejectionSamplingTrainer, Tempered, TopKPerPrompt
from rsft_hf.generative import Deduplicate, load_candidates

torch.set_num_threads(1)

SEED = 17
WORDS = ("<pad>", "<eos>", *"abcdefghijklmnop")
# A duration, or a figure made of one, is no result.
DURATIONS = ("seconds", "runtime", "per_second", "overhead_fraction")
MAX_KILLS_PER_RUN = 3


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def arguments(folder: Path, **others: Any) -> hf.TrainingArguments:
    """Saved and logged at every second step, evaluated nowhere."""
    steps = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": SEED}
    return hf.TrainingArguments(str(folder), per_device_train_batch_size=4, **{**steps, **quiet, **others})


def classifier() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(SEED)
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=len(WORDS), num_labels=3, **sizes))


def generator() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"pad_token_id": 0, "eos_token_id": 1, "attention_dropout": 0.1, "initializer_range": 0.4}
    torch.manual_seed(SEED)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(WORDS), **sizes, **special))


def labelled_rows() -> list[dict[str, Any]]:
    draws = random.Random(SEED)
    texts = [[draws.randrange(2, len(WORDS)) for _ in range(6)] for _ in range(22)]
    return [{"input_ids": text, "attention_mask": [1] * 6, "labels": sum(text) % 3} for text in texts]


def prompts() -> list[dict[str, Any]]:
    draws = random.Random(SEED)
    return [{"prompt": " ".join(draws.choices(WORDS[2:], k=1 + number % 3)), "row": number} for number in range(10)]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) / (1 + len(text.split())) for text in completions]


def weighted(folder: Path, losses: Any) -> RejectionSamplingTrainer:
    args = arguments(folder, num_train_epochs=3, learning_rate=5e-3)
    made = LossResampler(Tempered(0.7), losses=losses)
    return RejectionSamplingTrainer(classifier(), args, train_dataset=labelled_rows(), resampler=made)


def generative(folder: Path) -> RejectionSamplingTrainer:
    made = CandidateResampler(
        reward,
        TopKPerPrompt(2),
        num_candidates=3,
        generation_config=hf.GenerationConfig(do_sample=True, max_new_tokens=6),
        filters=(),
        dedup=Deduplicate(across_rounds=True),
        max_attempts=2,
        min_accepted_per_prompt=2,
        num_draws=12,
    )
    args = arguments(folder, num_train_epochs=3, learning_rate=1e-3)
    return RejectionSamplingTrainer(
        generator(), args, train_dataset=prompts(), processing_class=tokenizer(), resampler=made
    )


RUNS: dict[str, Callable[[Path], RejectionSamplingTrainer]] = {
    "weighted": lambda folder: weighted(folder, "forward"),
    "weighted, losses of training": lambda folder: weighted(folder, "training"),
    "generative": generative,
}


def finish(name: str, folder: Path) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one, and returns all that the run leaves."""
    trainer = RUNS[name](folder)
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "No valid checkpoint found" not in str(error):
            raise
        trainer = RUNS[name](folder)
        trainer.train()
    left: dict[str, Any] = {key: value.tolist() for key, value in trainer.model.state_dict().items()}
    left["drawn rows"] = trainer._progress.indices.tolist()
    # Of the last line Trainer says itself that it counts the steps of this call to train() alone.
    left["logged"] = [without_durations(line) for line in trainer.state.log_history[:-1]]
    left["steps"] = trainer.state.global_step
    if isinstance(trainer.resampler, LossResampler):
        left["table"] = trainer.resampler.table().to_list()
        left["suspects"] = trainer.resampler.suspects(5).to_list()
    else:
        left["candidates"] = load_candidates(folder / "candidates").to_list()
        left["rows"] = list(trainer.resampler.pool.accepted)
        for path in sorted((folder / "candidates").glob("round-*/manifest.json")):
            left[path.parent.name] = without_durations(json.loads(path.read_text())["metrics"])
    return json.loads(json.dumps(left, default=str))  # NaN and all, in the form that the runs are compared in


def without_durations(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not any(word in key for word in DURATIONS)}


def in_child(work: Callable[[], Any], kill_after: float | None = None, sign: int = signal.SIGKILL) -> int:
    """Runs a function in a fork of this process, killed after some seconds, and returns how the fork ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it ends with the process
            os.dup2(sys.stdout.fileno(), 2)
            work()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, sign)
    return os.waitpid(child, 0)[1]


def on_write(act: Callable[[], None]) -> None:
    """Calls a function before every file that this process opens for writing, moves or removes, from now on."""

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(values[1], str) and set(values[1]) & set("wax+")
        ):
            act()

    sys.addaudithook(watch)


def kill_at_write(number: int, sign: int) -> None:
    """Lets this process kill itself before its write of this number."""
    writes = itertools.count(1)

    def act() -> None:
        if next(writes) == number:
            os.kill(os.getpid(), sign)
            time.sleep(60)  # the signal arrives a moment later

    on_write(act)


def describe_whole_run(name: str, folder: Path, target: Path) -> None:
    """Trains to the end, and writes down what the run leaves, its writes and its seconds."""
    writes: list[None] = []
    on_write(lambda: writes.append(None))
    began = time.perf_counter()
    left = finish(name, folder)
    target.write_text(json.dumps({"writes": len(writes), "seconds": time.perf_counter() - began, "left": left}))


def killed_run(name: str, whole: dict[str, Any], draws: random.Random, folder: Path) -> tuple[int, list[str]]:
    """Kills a run one to three times and lets it end; returns the kills that hit, and what differs from `whole`."""
    kills = 0
    for _ in range(draws.randint(1, MAX_KILLS_PER_RUN)):
        sign = draws.choice((signal.SIGKILL, signal.SIGTERM))
        if draws.random() < 0.5:
            number = draws.randint(1, whole["writes"])

            def work(number: int = number, sign: int = sign) -> None:
                kill_at_write(number, sign)
                finish(name, folder / "run")

            status = in_child(work)
        else:
            after = draws.uniform(0, whole["seconds"])
            status = in_child(lambda: finish(name, folder / "run") and None, after, sign)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            return kills, [f"failed when it was resumed, after {kills} kills"]
        kills += os.WIFSIGNALED(status)
    target = folder / "left.json"
    if in_child(lambda: target.write_text(json.dumps(finish(name, folder / "run")))):
        return kills, [f"failed when it was resumed, after {kills} kills"]
    left = json.loads(target.read_text())
    keys = whole["left"].keys() | left.keys()
    return kills, [key for key in keys if as_text(whole["left"].get(key)) != as_text(left.get(key))]


def as_text(value: Any) -> str:
    """A value as text that is equal for equal numbers, NaN included, in whatever order a line was put together."""
    return json.dumps(value, sort_keys=True)


def measure(names: list[str], num_kills: int, seed: int, keep: Path | None = None) -> list[dict[str, Any]]:
    """Returns one line per kind of run: kills, runs, and the runs that differ with what differs in them."""
    results = []
    for name in names:
        draws, kills, runs, differing = random.Random(f"{seed} {name}"), 0, 0, list[dict[str, Any]]()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "whole.json"
            in_child(functools.partial(describe_whole_run, name, Path(folder) / "whole", target))
            whole = json.loads(target.read_text())
            while kills < num_kills / len(names):
                place = Path(folder) / f"{runs}"
                place.mkdir()
                hit, differences = killed_run(name, whole, draws, place)
                kills, runs = kills + hit, runs + 1
                if differences:
                    differing.append({"run": runs, "differs": sorted(differences)})
                    if keep is not None:
                        shutil.copytree(place, keep / f"{name}-{runs}")
                shutil.rmtree(place)
        results.append({"run": name, "kills": kills, "runs": runs, "writes": whole["writes"], "differing": differing})
    return results


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--num_kills", type=int, default=200, help="kills that hit, all kinds of runs together")
    parser.add_argument("--seed", type=int, default=0, help="of the points of the kills")
    parser.add_argument("--only", choices=RUNS, help="one kind of run")
    parser.add_argument("--keep", type=Path, help="folder for the runs that differ")
    options = parser.parse_args()
    logging.set_verbosity_error()
    names = [options.only] if options.only else list(RUNS)
    results = measure(names, options.num_kills, options.seed, options.keep)
    print(f"{'run':32} {'kills':>6} {'runs':>6} {'writes':>7} {'differing':>10}")
    for line in results:
        print(f"{line['run']:32} {line['kills']:6} {line['runs']:6} {line['writes']:7} {len(line['differing']):10}")
        for one in line["differing"]:
            print(f"    run {one['run']}: {', '.join(one['differs'])}")
    write_json({"runs": results}, options.json)
    sys.exit(any(line["differing"] for line in results))


if __name__ == "__main__":
    main()
