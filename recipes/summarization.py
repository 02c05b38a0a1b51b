"""Fine-tune a summarizer on its own best summaries: rewarded by ROUGE, a window of lengths, and the names they keep.

    python recipes/summarization.py --output_dir outputs/summaries               # DialogSum, flan-t5-small: wants a GPU
    python recipes/summarization.py --output_dir outputs/mine --train_file train.jsonl --validation_file test.jsonl

    python recipes/summarization.py --output_dir outputs/demo/minutes \\
        --model_name_or_path recipes/data/meetings/model \\
        --train_file recipes/data/meetings/train.jsonl --validation_file recipes/data/meetings/test.jsonl \\
        --prefix "" --num_train_epochs 3 --learning_rate 1e-3 --max_new_tokens 24 --temperature 1.0

The third line needs no download and no GPU. Rows hold a text and its summary, of several the first. The output folder
holds the model and its tokenizer, candidates/ with every candidate, its rewards and verdict, and accepted.jsonl.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset, load_dataset
from rouge_score.rouge_scorer import RougeScorer

from rsft_hf import CandidateResampler, RejectionSamplingSeq2SeqTrainer, Threshold, TopKPerPrompt, export_sft
from rsft_hf.acceptance import Sequence
from rsft_hf.generative import drop_long_prompts
from rsft_hf.rewards import RougeReward

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class ScriptArguments:
    """Data, model, candidates and acceptance."""

    dataset_name: str = field(default="knkarthick/dialogsum", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    text_column: str = field(default="dialogue", metadata={"help": "Column of the texts."})
    summary_column: str = field(default="summary", metadata={"help": "Column of their summaries."})
    prefix: str = field(default="summarize: ", metadata={"help": "Put before each text."})
    model_name_or_path: str = field(default="google/flan-t5-small", metadata={"help": "Encoder-decoder model."})
    max_train_samples: int = field(default=2000, metadata={"help": "Number of texts of a round."})
    max_eval_samples: int = field(default=500, metadata={"help": "Number of held-out rows."})
    max_prompt_length: int = field(default=512, metadata={"help": "Texts of more tokens are left out."})
    num_candidates: int = field(default=8, metadata={"help": "Candidates per text and round."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of the candidates."})
    max_new_tokens: int = field(default=96, metadata={"help": "Maximum length of a summary."})
    length_weight: float = field(default=0.1, metadata={"help": "Reward for a length near the reference's."})
    coverage_weight: float = field(default=0.2, metadata={"help": "Reward for the reference's names."})
    quantile: float = field(default=0.3, metadata={"help": "Of the best candidates, the share that is rejected."})


def load_split(script: ScriptArguments, split: str, file: str | None, num_rows: int, seed: int) -> Dataset:
    """Returns rows with `prompt` (the text) and `reference` (its summary)."""
    kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(file or "").suffix, "json")
    name, config = (kind, None) if file else (script.dataset_name, script.dataset_config)
    rows = load_dataset(name, config, data_files=file, split="train" if file else split).shuffle(seed)
    rows = rows.select(range(min(num_rows, len(rows)))).select_columns([script.text_column, script.summary_column])
    rows = rows.rename_columns({script.text_column: "prompt", script.summary_column: "reference"})

    def first(row: dict[str, Any]) -> dict[str, Any]:
        given = [row["reference"]] if isinstance(row["reference"], str) else row["reference"] or []
        one = next(filter(None, given), None)
        return {"prompt": script.prefix + row["prompt"] if row["prompt"] else None, "reference": one}

    return rows.map(first).filter(lambda row: row["prompt"] and row["reference"])


def length_near_reference(completions: list[str], reference: list[str], **columns: Any) -> list[float]:
    """Returns the shorter of the two numbers of words over the longer, in [0, 1]."""
    counts = [(len(text.split()), len(true.split())) for text, true in zip(completions, reference, strict=True)]
    return [min(pair) / max(1, *pair) for pair in counts]


def coverage(completions: list[str], prompts: list[str], reference: list[str], **columns: Any) -> list[float]:
    """Returns the share of the reference's names that the summary has: words of it with which a turn begins."""
    found = []
    for text, prompt, true in zip(completions, prompts, reference, strict=True):
        names = set(re.findall(r"#?(\w+)#? ?:", prompt)) & set(re.findall(r"\w+", true))
        found.append(len(names & set(re.findall(r"\w+", text))) / len(names) if names else 1.0)
    return found


def compute_metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
    """Returns ROUGE-1, -2 and -L F-measures, in %; predictions and labels are texts."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(true, text) for text, true in zip(prediction.predictions, prediction.label_ids, strict=True)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.Seq2SeqTrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set and model
    train = load_split(script, script.train_split, script.train_file, script.max_train_samples, args.seed)
    test = load_split(script, script.validation_split, script.validation_file, script.max_eval_samples, seed=0)
    tokenizer = hf.AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)
    test = drop_long_prompts(test, tokenizer, script.max_prompt_length, is_encoder_decoder=True)

    # 2. Train: an epoch is a round; of each text the best candidate, and of these the upper part
    sampling = {"temperature": script.temperature, "top_k": 0, "max_new_tokens": script.max_new_tokens}
    resampler = CandidateResampler(
        [RougeReward(), length_near_reference, coverage],
        Sequence(TopKPerPrompt(1), Threshold(quantile=script.quantile)),
        reward_weights=[1.0, script.length_weight, script.coverage_weight],
        num_candidates=script.num_candidates,
        generation_config=hf.GenerationConfig(do_sample=True, **sampling),
        max_prompt_length=script.max_prompt_length,
        on_long_prompt="drop",
        on_nothing_accepted="skip",
    )
    data = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer}
    keywords = {"compute_metrics": compute_metrics, "resampler": resampler, **data}
    trainer = RejectionSamplingSeq2SeqTrainer(model, args, **keywords)
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 3. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        export_sft(output / "candidates").to_json(str(output / "accepted.jsonl"))
        print(f"\n{'':10}{'before':>8}{'after':>8}")
        for name in ROUGE:
            print(f"{name:10}{before[f'before_{name}']:8.2f}{after[f'after_{name}']:8.2f}")
        print(f"The model, candidates and accepted.jsonl are in {output.resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
