"""Fine-tune a translator on its own best translations: each round samples candidates, and trains on the accepted ones.

    python recipes/translation.py --output_dir outputs/translation     # Multi30k, opus-mt-en-de: wants a GPU
    python recipes/translation.py --output_dir outputs/mine --train_file train.csv --validation_file test.csv

    python recipes/translation.py --output_dir outputs/demo/translation \\
        --model_name_or_path recipes/data/numbers/model --train_file recipes/data/numbers/train.csv \\
        --validation_file recipes/data/numbers/test.csv --num_train_epochs 4 --learning_rate 2e-3 \\
        --max_new_tokens 24 --temperature 1.0 --bleu_tokenize char

The third line translates number words and needs no download and no GPU: about a minute on one CPU core. Files are CSV,
JSONL or Parquet with one column per language. The output folder holds the model and its tokenizer, where
`AutoModelForSeq2SeqLM.from_pretrained(folder)` finds them, candidates/ with every candidate, its reward and verdict,
and accepted.jsonl and preferences.jsonl, which TRL's SFTTrainer and DPOTrainer read.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from datasets import Dataset, load_dataset
from sacrebleu.metrics import BLEU, CHRF

from rsft_hf import (
    CandidateResampler,
    RejectionSamplingSeq2SeqTrainer,
    Threshold,
    TopKPerPrompt,
    export_dpo,
    export_sft,
)
from rsft_hf.acceptance import Sequence
from rsft_hf.generative import drop_long_prompts
from rsft_hf.rewards import ChrfReward


@dataclass
class ScriptArguments:
    """Data, model, candidates and acceptance."""

    dataset_name: str = field(default="bentrevett/multi30k", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of held-out rows."})
    source_column: str = field(default="en", metadata={"help": "Column of the sentences, or translation.en."})
    target_column: str = field(default="de", metadata={"help": "Column of their translations."})
    model_name_or_path: str = field(default="Helsinki-NLP/opus-mt-en-de", metadata={"help": "Encoder-decoder model."})
    max_train_samples: int = field(default=2000, metadata={"help": "Number of prompts of a round."})
    max_eval_samples: int = field(default=500, metadata={"help": "Number of held-out rows."})
    num_candidates: int = field(default=8, metadata={"help": "Candidates per prompt and round."})
    temperature: float = field(default=0.6, metadata={"help": "Temperature of the candidates."})
    prefix: str = field(default="", metadata={"help": 'Put before each sentence, such as ">>deu<< ".'})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Sentences of more tokens are left out."})
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of a candidate."})
    quantile: float = field(default=0.5, metadata={"help": "Of the best candidates, the share that is rejected."})
    bleu_tokenize: str = field(default="13a", metadata={"help": "Tokenizer of BLEU: zh, ja-mecab, ko-mecab, char..."})


def load_split(script: ScriptArguments, split: str, file: str | None, num_rows: int, seed: int) -> Dataset:
    """Returns rows with `prompt` (the sentence) and `reference` (its translation)."""
    kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(file or "").suffix, "json")
    name, config = (kind, None) if file else (script.dataset_name, script.dataset_config)
    dataset = load_dataset(name, config, data_files=file, split="train" if file else split)
    dataset = dataset.flatten().select_columns([script.source_column, script.target_column])
    dataset = dataset.rename_columns({script.source_column: "prompt", script.target_column: "reference"})
    dataset = dataset.filter(lambda row: row["prompt"] and row["reference"]).shuffle(seed)
    dataset = dataset.select(range(min(num_rows, len(dataset))))
    return dataset.map(lambda row: {"prompt": script.prefix + row["prompt"]}) if script.prefix else dataset


def compute_metrics(prediction: hf.EvalPrediction, tokenize: str, prefix: str = "") -> dict[str, float]:
    """Returns corpus BLEU and chrF, the percentage of exact matches, and BLEU by words of the source: all are texts."""
    texts, references, bleu = prediction.predictions, prediction.label_ids, BLEU(tokenize=tokenize)
    is_equal = [text.strip() == true.strip() for text, true in zip(texts, references, strict=True)]
    metrics = {"exact_match": 100 * sum(is_equal) / len(texts)}
    metrics |= {name: one.corpus_score(texts, [references]).score for name, one in (("bleu", bleu), ("chrf", CHRF()))}
    lengths = [len(source.removeprefix(prefix).split()) for source in prediction.inputs]
    for low, high in ((1, 10), (11, 20), (21, 10_000)):
        if rows := [row for row, length in enumerate(lengths) if low <= length <= high]:
            some, true = ([each[row] for row in rows] for each in (texts, references))
            metrics[f"bleu_from_{low}"] = bleu.corpus_score(some, [true]).score
    return metrics


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.Seq2SeqTrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=32)
    parser.set_defaults(include_for_metrics=["inputs"])  # for BLEU by the length of the source
    parser.set_defaults(logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set: prompts, each with the reference that the reward and the metrics read
    train_dataset = load_split(script, script.train_split, script.train_file, script.max_train_samples, args.seed)
    eval_dataset = load_split(script, script.validation_split, script.validation_file, script.max_eval_samples, seed=0)

    # 2. Model, in single precision: half precision loses small updates
    tokenizer = hf.AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)
    for name, values in model.named_parameters():
        if name.endswith("embed_positions.weight"):
            values.requires_grad_(False)  # Marian's are fixed, but loaded as trainable, and saved in no checkpoint

    if script.max_prompt_length is not None:
        eval_dataset = drop_long_prompts(eval_dataset, tokenizer, script.max_prompt_length, is_encoder_decoder=True)

    # 3. Train: an epoch is a round; of each prompt the best candidate, and of these the upper part
    sampling = {"temperature": script.temperature, "top_k": 0, "max_new_tokens": script.max_new_tokens}
    resampler = CandidateResampler(
        reward_funcs=[ChrfReward()],
        acceptance=Sequence(TopKPerPrompt(1), Threshold(quantile=script.quantile)),
        num_candidates=script.num_candidates,
        generation_config=hf.GenerationConfig(do_sample=True, **sampling),
        on_nothing_accepted="skip",
        max_prompt_length=script.max_prompt_length,
        on_long_prompt="drop",
    )
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}
    measure = partial(compute_metrics, tokenize=script.bleu_tokenize, prefix=script.prefix)
    trainer = RejectionSamplingSeq2SeqTrainer(model, args, compute_metrics=measure, resampler=resampler, **data)
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 4. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        export_sft(output / "candidates").to_json(str(output / "accepted.jsonl"))
        export_dpo(output / "candidates").to_json(str(output / "preferences.jsonl"))
        print(f"\n{'':12}{'before':>8}{'after':>8}")
        for name in ("bleu", "chrf", "exact_match", "bleu_from_1", "bleu_from_11", "bleu_from_21"):
            if f"after_{name}" in after:
                print(f"{name:12}{before[f'before_{name}']:8.2f}{after[f'after_{name}']:8.2f}")
        print(f"The model, candidates, accepted.jsonl and preferences.jsonl are in {output.resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
