"""Bad inputs and what is said of them: each row of docs/errors.md is raised here, and compared with the file.

After a message has changed on purpose, `RSFT_WRITE_ERRORS=1 pytest tests/test_bad_inputs.py` writes the file anew.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf

import generators as g
import rsft_hf
import runs
from rsft_hf import acceptance, engines, generative, predictive, rewards, weighted

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"

MADE, TRAINER, TRAIN = "when it is made", "when the trainer is made", "when training begins"

# Python expressions; `weighted(...)` and `rounds(...)` make a trainer of each half, `.train()` begins its training.
INPUTS: dict[str, list[str]] = {
    MADE: [
        "LossResampler(weighting='loss')",
        "LossResampler(weighting=Proportional)",
        "LossResampler(num_draws=0)",
        "LossResampler(num_draws=2.5)",
        "LossResampler(losses='both')",
        "LossResampler(Entropy(), losses='training')",
        "LossResampler(warmup_epochs=-1)",
        "LossResampler(uniform_final_epochs=0.5)",
        "LossResampler(every_n_epochs=0)",
        "LossResampler(importance_correction=1.5)",
        "LossResampler(ema_decay=1.0)",
        "LossResampler(batch_size=0)",
        "Tempered(-1.0)",
        "Clipped(1.5)",
        "Floored(-0.1)",
        "Chain()",
        "rejection_sample(torch.tensor([1.0, -1.0]), 4, torch.Generator())",
        "rejection_sample(torch.zeros(3), 4, torch.Generator())",
        "rejection_sample(torch.ones(3), 0, torch.Generator())",
        "effective_sample_size(torch.tensor([float('nan')]))",
        "CandidateResampler(None)",
        "CandidateResampler([])",
        "CandidateResampler(reward, acceptance='best')",
        "CandidateResampler(reward, TopKPerPrompt(0))",
        "CandidateResampler(reward, Threshold())",
        "CandidateResampler(reward, num_candidates=0)",
        "CandidateResampler(reward, max_attempts=0)",
        "CandidateResampler(reward, num_candidates=2, min_accepted_per_prompt=3)",
        "CandidateResampler(reward, num_draws=0)",
        "CandidateResampler(reward, replay_rounds=-1)",
        "CandidateResampler(reward, round_start='first')",
        "CandidateResampler(reward, on_nothing_accepted='retry')",
        "CandidateResampler(reward, supervised_fraction=0.5)",
        "CandidateResampler(reward, filters=[RejectTruncated])",
        "CandidateResampler(reward, dedup=True)",
        "CandidateResampler(reward, reward_weights=[1.0, 2.0])",
        "CandidateResampler(reward, generation_config={'max_new_tokens': 8})",
        "CandidateResampler(reward, generation_config=GenerationConfig(max_new_tokens=8, num_beams=4))",
        "CandidateResampler(reward, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False))",
        "CandidateResampler(reward, max_prompt_length=0)",
        "CandidateResampler(reward, on_long_prompt='cut')",
        "PredictionResampler()",
        "PredictionResampler(unlabelled, Sharpened)",
        "PredictionResampler(unlabelled, pseudo_fraction=1.0)",
        "PredictionResampler(unlabelled, min_confidence=95)",
        "PredictionResampler(unlabelled, confidence_quantile=1.0)",
        "PredictionResampler(unlabelled, temperature=0.0)",
        "Agreement(1)",
        "WaitKEngine(0)",
        "generate_candidates(None, None, [], 'folder', top_k=5)",
        "RSO(beta=0.0)",
        "LengthRange(5, 2)",
        "LengthWindow(5, 2)",
        "FormatReward('(')",
        "MetricReward('no_such_metric')",
        "JudgeReward('m', 'http://localhost:8000/v1', low=3.0, high=1.0)",
        "EndpointEngine('localhost:8000', 'm')",
        "EndpointEngine('http://localhost:8000/v1', 'm', timeout_seconds=0)",
        "InFlightEngine(max_sequences=0)",
        "CandidateTableCallback(0)",
        "export_sft('no_such_folder')",
        "load_candidates('no_such_folder')",
        "accept_again('no_such_folder', 'other', TopKPerPrompt(1))",
    ],
    TRAINER: [
        "weighted(resampler=Tempered())",
        "weighted(train_dataset=[])",
        "weighted(train_dataset=datasets.IterableDataset.from_generator(lambda: iter([])), args={'max_steps': 2})",
        "weighted(args={'train_sampling_strategy': 'batch_rebalance'})",
        "weighted(args={'accelerator_config': {'dispatch_batches': True}})",
        "weighted(args={'dataloader_in_order': False, 'dataloader_num_workers': 2})",
    ],
    TRAIN: [
        "weighted().train(resume_from_checkpoint=True)",
        "weighted(resampler=LossResampler(ClassBalanced()), train_dataset=unlabelled).train()",
        "weighted(resampler=LossResampler(lambda losses: losses[:2])).train()",
        "weighted(resampler=LossResampler(lambda losses: -losses)).train()",
        "weighted(model=diverged).train()",
        "weighted(resampler=LossResampler(task_column='task')).train()",
        "weighted(resampler=PredictionResampler(runs.rows(), reference_column='gold')).train()",
        "weighted(resampler=PredictionResampler([{'input_ids': [5]}])).train()",
        "weighted(resampler=PredictionResampler(doubtful_rows=[99])).train()",
        "weighted(resampler=PredictionResampler(runs.rows(), accepts_tokens=True)).train()",
        "weighted(resampler=PredictionResampler(runs.rows()), train_dataset=unlabelled).train()",
        "rounds(train_dataset=[{'question': 'a'}]).train()",
        "rounds(train_dataset=[{'prompt': ''}]).train()",
        "rounds(train_dataset=[{'prompt': None}]).train()",
        "rounds(train_dataset=[{'prompt': 3}]).train()",
        "rounds(train_dataset=[{'prompt': 'a ' * 60}]).train()",
        "rounds(train_dataset=[{'prompt': 'a'}, {'prompt': [{'role': 'user', 'content': 'a'}]}]).train()",
        "rounds(train_dataset=[{'prompt': [{'role': 'user', 'content': None}]}]).train()",
        "rounds(train_dataset=[{'prompt': [{'role': 'assistant', 'content': 'a'}]}]).train()",
        "rounds(train_dataset=[{'prompt': [{'role': 'user', 'content': 'a'}], 'tools': 'add'}]).train()",
        "rounds(processing_class=None).train()",
        "rounds(model=classifier).train()",
        "rounds(needs_gold).train()",
        "rounds(on_nothing_accepted='reference').train()",
        "rounds(generation_config=None).train()",
        "rounds(generation_config=GenerationConfig(max_new_tokens=65)).train()",
        "rounds(engine='fast').train()",
        "rounds(engine=WaitKEngine(3)).train()",
        "rounds(max_prompt_length=2, train_dataset=[{'prompt': 'a b c'}]).train()",
        "rounds(merge_adapter=True).train()",
        "rounds(reference_model='base').train()",
        "rounds(round_start='best').train()",
        "rounds(data_collator=DataCollatorForLanguageModeling(words, mlm=False)).train()",
        "rounds(args={'metric_for_best_model': 'bleu', 'eval_strategy': 'epoch'}, eval_dataset=held_out).train()",
        "rounds(compute_metrics=scores, args={'batch_eval_metrics': True}, eval_dataset=held_out).train()",
        "rounds(eval_generation_config='greedy', eval_dataset=held_out).train()",
    ],
}  # fmt: skip


def reward(completions: list, **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def needs_gold(completions: list, gold: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def scores(prediction: hf.EvalPrediction, compute_result: bool = True) -> dict[str, float]:
    return {}


class Counts(hf.TrainerCallback):
    """Optimizer steps of all trainers of this test."""

    steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        Counts.steps += 1


def make_weighted(**keywords: Any) -> hf.Trainer:
    args = runs.arguments(tempfile.mkdtemp(), **keywords.pop("args", {}))
    parts = {"model": runs.bert(), "train_dataset": runs.rows(), "data_collator": runs.collate, "callbacks": [Counts()]}
    return rsft_hf.RejectionSamplingTrainer(args=args, **{**parts, **keywords})


def make_rounds(function: Any = reward, **keywords: Any) -> hf.Trainer:
    names = ("args", "train_dataset", "eval_dataset", "processing_class", "model", "data_collator", "compute_metrics")
    parts = {name: keywords.pop(name) for name in names if name in keywords}
    options = {"generation_config": g.sampling(), "num_candidates": 2, "filters": (), **keywords}
    args = g.arguments(tempfile.mkdtemp(), **parts.pop("args", {}))
    defaults = {"model": g.tiny_model(), "train_dataset": [{"prompt": "a"}], "processing_class": g.tokenizer()}
    made = rsft_hf.CandidateResampler(function, **options)
    return rsft_hf.RejectionSamplingTrainer(args=args, resampler=made, callbacks=[Counts()], **{**defaults, **parts})


def names() -> dict[str, Any]:
    """What the expressions are evaluated with."""
    found = {"torch": torch, "datasets": datasets, "reward": reward, "needs_gold": needs_gold}
    found |= {"scores": scores, "runs": runs}
    for module in (rsft_hf, acceptance, engines, generative, predictive, rewards, weighted):
        found |= {name: getattr(module, name) for name in module.__all__}
    found |= {"GenerationConfig": hf.GenerationConfig, "words": g.tokenizer(), "held_out": g.prompts(2, first=82)}
    found |= {"DataCollatorForLanguageModeling": hf.DataCollatorForLanguageModeling, "classifier": runs.bert()}
    diverged = runs.bert()
    diverged.classifier.weight.data.fill_(float("nan"))
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in runs.rows()]
    return found | {"weighted": make_weighted, "rounds": make_rounds, "diverged": diverged, "unlabelled": unlabelled}


def line_of(code: str, when: str, error: Exception) -> str:
    """A row of the page; what differs from run to run is replaced."""
    said = re.sub(r"/tmp/[\w/.-]+", "OUTPUT_DIR", " ".join(str(error).split()))
    said = re.sub(r"<function (\S+) at 0x\w+>|<bound method .*? at 0x\w+>>", "FUNCTION", said)
    said = re.sub(r" at 0x[0-9a-f]+", "", said)
    cells = [f"`{code}`", f"`{type(error).__name__}`", said.replace("|", "\\|").replace("<", "&lt;"), when]
    return f"| {' | '.join(cells)} |"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Every input is tried: it raises, and before any training step and any generated candidate."""
    found, generated = names(), []
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.InFlightEngine, "__call__", lambda *_: generated.append(1) or iter(()))
        for when, codes in INPUTS.items():
            for code in codes:
                with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError)) as caught:
                    eval(code, found)
                rows.append(line_of(code, when, caught.value))
    assert Counts.steps == 0
    assert generated == []
    return rows


HEAD = """# What is said of bad inputs

Each row is an input, the error, its message and when it is raised; `tests/test_bad_inputs.py` raises all of them and
writes this page. `weighted(...)` and `rounds(...)` make a trainer of each half; none of these inputs costs a training
step or a generated candidate.

| input | error | message | raised |
|---|---|---|---|
"""


def test_the_page_says_what_is_raised(lines: list[str]) -> None:
    page = HEAD + "\n".join(lines) + "\n"
    if os.environ.get("RSFT_WRITE_ERRORS"):
        PAGE.write_text(page, encoding="utf-8")
    assert len(lines) >= 60
    for ours, theirs in zip(page.splitlines(), PAGE.read_text(encoding="utf-8").splitlines(), strict=True):
        assert ours == theirs


def test_messages_name_the_value_and_a_remedy(lines: list[str]) -> None:
    for line in lines:
        message = line.split(" | ")[2]
        assert len(message) > 30, line
        assert "Error" not in message.split(":")[0], line
