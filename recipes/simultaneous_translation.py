"""Fine-tune a translator to translate while it reads: rounds of candidates written under a wait-k policy.

    python recipes/simultaneous_translation.py --output_dir outputs/wait_k     # Multi30k, opus-mt-en-de: wants a GPU

    python recipes/simultaneous_translation.py --output_dir outputs/demo/wait_k \\
        --model_name_or_path recipes/data/numbers/model --train_file recipes/data/numbers/train.csv \\
        --validation_file recipes/data/numbers/test.csv --max_train_samples 300 --num_train_epochs 3 \\
        --learning_rate 3e-4 --max_new_tokens 24 --bleu_tokenize char

Wait-k (Ma et al. 2019, arXiv:1810.08398) reads k tokens, then writes and reads one in turn. Candidates are written so,
and rewarded by chrF minus a price of their average lagging; the best are trained on beside references, with sources
cut at random. The output folder holds model, candidates/ and latency.png: BLEU against lagging before and after.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU

from rsft_hf import CandidateResampler, RejectionSamplingSeq2SeqTrainer, Threshold, TopKPerPrompt
from rsft_hf.acceptance import Sequence
from rsft_hf.engines import GenerationRequest, WaitKEngine, average_lagging
from rsft_hf.rewards import ChrfReward

POLICIES = {"1": 1, "3": 3, "5": 5, "7": 7, "full": 10_000}


@dataclass
class ScriptArguments:
    """Data, model and policy."""

    dataset_name: str = field(default="bentrevett/multi30k", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    source_column: str = field(default="en", metadata={"help": "Column of the sentences, or translation.en."})
    target_column: str = field(default="de", metadata={"help": "Column of their translations."})
    model_name_or_path: str = field(default="Helsinki-NLP/opus-mt-en-de", metadata={"help": "Encoder-decoder model."})
    max_train_samples: int = field(default=2000, metadata={"help": "Number of prompts of a round."})
    max_eval_samples: int = field(default=500, metadata={"help": "Number of held-out rows."})
    bleu_tokenize: str = field(default="13a", metadata={"help": "Tokenizer of sacrebleu."})
    num_draws: int | None = field(default=None, metadata={"help": "Rows of a round; by default its prompts' number."})
    train_k: int = field(default=3, metadata={"help": "k of the policy that the candidates are written under."})
    lagging_price: float = field(default=0.01, metadata={"help": "Reward lost per token of average lagging."})
    num_candidates: int = field(default=4, metadata={"help": "Candidates per prompt and round."})
    temperature: float = field(default=0.6, metadata={"help": "Temperature of the candidates."})
    quantile: float = field(default=0.5, metadata={"help": "Of the best candidates, the share that is rejected."})
    supervised_fraction: float = field(default=0.5, metadata={"help": "Share of rows with references as targets."})
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum length of a translation."})


def cut_sources(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hides the end of half of the sources, and the labels that wait-k, of a random k, would not have written yet."""
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        read, k = int(torch.randint(1, length + 1, ())), int(torch.randint(1, 8, ()))
        if torch.rand(()) < 0.5 and k <= read < length:
            batch["attention_mask"][row, read:] = 0
            batch["labels"][row, read - k + 1 :] = -100
    return batch


def main(argv: list[str] | None = None) -> dict[str, dict[str, tuple[float, float]]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.Seq2SeqTrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=32)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)
    for name, values in model.named_parameters():
        if name.endswith("embed_positions.weight"):
            values.requires_grad_(False)  # Marian's are fixed, but loaded as trainable, and saved in no checkpoint

    # 1. Data set
    def load(split: str, file: str | None, seed: int) -> Dataset:
        kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(file or "").suffix, "json")
        name, config = (kind, None) if file else (script.dataset_name, script.dataset_config)
        columns = {script.source_column: "prompt", script.target_column: "reference"}
        rows = load_dataset(name, config, data_files=file, split="train" if file else split)
        return rows.flatten().select_columns(list(columns)).rename_columns(columns).shuffle(seed)

    references = load(script.train_split, script.train_file, args.seed)
    train = references.take(min(script.max_train_samples, len(references)))
    test = load(script.validation_split, script.validation_file, seed=0)
    test = test.take(min(script.max_eval_samples, len(test)))

    # 2. Train
    def lagging(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        num_read = [len(tokenizer(source)["input_ids"]) for source in prompts]
        return [average_lagging(script.train_k, *pair) for pair in zip(num_read, map(len, completion_ids), strict=True)]

    sampling = {"temperature": script.temperature, "top_k": 0, "max_new_tokens": script.max_new_tokens}
    resampler = CandidateResampler(
        [ChrfReward(), lagging],
        Sequence(TopKPerPrompt(1), Threshold(quantile=script.quantile)),
        reward_weights=[1.0, -script.lagging_price],
        num_candidates=script.num_candidates,
        generation_config=hf.GenerationConfig(do_sample=True, **sampling),
        engine=WaitKEngine(script.train_k),
        supervised_dataset=references.rename_column("reference", "completion") if script.supervised_fraction else None,
        supervised_fraction=script.supervised_fraction,
        num_draws=script.num_draws,
    )
    pad = hf.DataCollatorForSeq2Seq(tokenizer)
    keywords = {"train_dataset": train, "processing_class": tokenizer, "resampler": resampler}
    trainer = RejectionSamplingSeq2SeqTrainer(model, args, lambda rows: cut_sources(pad(rows)), **keywords)

    def evaluate() -> dict[str, tuple[float, float]]:
        bleu = BLEU(tokenize=script.bleu_tokenize)
        sources, true = [tokenizer(text)["input_ids"] for text in test["prompt"]], [test["reference"][:]]
        points, ends = {}, {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = hf.GenerationConfig(do_sample=False, max_new_tokens=script.max_new_tokens, **ends)
        request = GenerationRequest(sources, [[0]] * len(sources), config)
        for name, k in POLICIES.items():
            found = sorted(WaitKEngine(k)(trainer.model.eval(), request), key=lambda one: one.prompt)
            texts = tokenizer.batch_decode([one.token_ids for one in found], skip_special_tokens=True)
            behind = [average_lagging(k, len(sources[one.prompt]), len(one.token_ids)) for one in found]
            points[name] = sum(behind) / len(behind), bleu.corpus_score(texts, true).score
        return points

    before = evaluate()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 3. Evaluate and save
    after = evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        axes = Figure().subplots()
        axes.set(xlabel="average lagging, tokens", ylabel="BLEU", title="before (dashed) and after")
        axes.plot(*zip(*before.values(), strict=True), "o--", *zip(*after.values(), strict=True), "o-")
        axes.figure.savefig(Path(args.output_dir) / "latency.png")
        print(f"\n{'k':6}{'lagging':>9}{'before':>8}{'lagging':>9}{'after':>8}")
        for k in POLICIES:
            print(f"{k:6}{before[k][0]:9.2f}{before[k][1]:8.2f}{after[k][0]:9.2f}{after[k][1]:8.2f}")
        print(f"The model, candidates and latency.png are in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
