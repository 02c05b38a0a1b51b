"""Training runs on two gloo processes for `test_distributed.py`, started by torchrun; writes each run's results.

torchrun --nproc_per_node 2 tests/helpers/distributed_runs.py OUTPUT_DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers as hf

import runs
import zoo
from process_groups import write_and_leave
from rsft_hf import LossResampler, PredictionResampler, RejectionSamplingTrainer, Tempered, measure_losses
from rsft_hf.predictive import load_pseudo_labels

ARGS = {"use_cpu": True, "per_device_train_batch_size": 2}


def train(name: str, output_dir: Path, trainer_class: type = RejectionSamplingTrainer, **keywords) -> dict:
    """Returns the losses, parameters and draws of one run on this process."""
    torch.manual_seed(99)
    keywords["args"] = {**ARGS, **keywords.get("args", {})}
    trainer = runs.trained(trainer_class, output_dir / name, **keywords)
    result = {
        "losses": runs.losses(trainer),
        "parameters": [float(value.double().sum()) for value in trainer.model.state_dict().values()],
    }
    if trainer_class is RejectionSamplingTrainer:
        result["indices"] = trainer._progress.indices.tolist()
        result["table"] = trainer.resampler.table().to_pandas().fillna(-1).to_dict("list")
        if trainer.resampler.losses == "training":
            result["report"] = trainer.resampler.label_report().table().to_dict()
    return result


def resumed(output_dir: Path, source: str) -> dict:
    """Returns the results of a run resumed from its second-but-last checkpoint."""
    args = {"save_strategy": "steps", "save_steps": 5}
    folder = output_dir / f"weighted_{source}" / "checkpoint-10"
    return train(f"resumed_{source}", output_dir, args=args, resampler=LossResampler(losses=source), resume=str(folder))


def predictive(output_dir: Path, **args) -> dict:
    """Returns rows, labels and parameters of a run with drawn labels, proposed by the average of the weights."""
    pool = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in runs.rows(61)[26:]]
    torch.manual_seed(99)
    trainer = runs.trained(
        RejectionSamplingTrainer,
        output_dir / "predictive",
        args={**ARGS, **args},
        resampler=PredictionResampler(pool, ema_decay=0.9, warmup_epochs=0),
    )
    dataset = trainer.get_train_dataloader().dataset
    return {
        "indices": trainer._progress.indices.tolist(),
        "labels": [dataset[26 + row]["labels"] for row in range(len(pool))],
        "parameters": [float(value.double().sum()) for value in trainer.model.state_dict().values()],
        "stored": load_pseudo_labels(output_dir / "predictive", only_accepted=False).to_list(),
        "metrics": {name: value for line in trainer.state.log_history for name, value in line.items() if "/" in name},
    }


def corrected(output_dir: Path, name: str) -> dict:
    """Returns the logged loss of one accumulation window over both processes, and sum c n l / sum c n by hand."""
    case = next(case for case in zoo.CASES if case.name == name)
    resampler = LossResampler(Tempered(2.0), num_draws=8, importance_correction=1.0)
    args = {**ARGS, "learning_rate": 0.0, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = case.trainer(output_dir / name, RejectionSamplingTrainer, args, resampler=resampler)
    trainer.train()
    rows = trainer._sampler.indices
    losses, factors = torch.tensor(resampler.table()["loss"][:])[rows], resampler._row_factors[rows]
    labels = [trainer.data_collator([trainer.train_dataset[row]])["labels"][..., 1:] for row in rows.tolist()]
    counts = torch.tensor([float(values.ne(-100).sum()) for values in labels])
    expected = (factors * counts * losses).sum() / (factors * counts).sum()
    return {"losses": runs.losses(trainer), "expected": float(expected)}


def main() -> None:
    """Trains with plain Trainer, equal weights, loss weights, and from a checkpoint."""
    output_dir = Path(sys.argv[1])
    results = {"plain": train("plain", output_dir, hf.Trainer)}
    for source in ("forward", "training"):
        equal, weighted = LossResampler(Tempered(0.0), losses=source), LossResampler(losses=source)
        results[f"equal_{source}"] = train(f"equal_{source}", output_dir, resampler=equal)
        args = {"save_strategy": "steps", "save_steps": 5}
        results[f"weighted_{source}"] = train(f"weighted_{source}", output_dir, args=args, resampler=weighted)
        if runs.RESUMES_PROCESSES:
            results[f"resumed_{source}"] = resumed(output_dir, source)
    results["predictive"] = predictive(output_dir)
    for name in ("llama_lm", "llama_label_smoothing"):
        results[f"corrected_{name}"] = corrected(output_dir, name)
    trainer = hf.Trainer(runs.bert(), runs.arguments(output_dir, **ARGS), runs.collate, runs.rows())
    results["measured"] = measure_losses(trainer, batch_size=4).losses.tolist()
    write_and_leave(output_dir, results)


if __name__ == "__main__":
    main()
