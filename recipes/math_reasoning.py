"""Fine-tune on the model's own right solutions of word problems, distinct by their equations (RFT, arXiv:2308.01825).

    python recipes/math_reasoning.py --output_dir outputs/math              # GSM8K, SmolLM2-360M-Instruct: wants a GPU
    python recipes/math_reasoning.py --output_dir outputs/mine --train_file train.jsonl --validation_file test.jsonl

    python recipes/math_reasoning.py --output_dir outputs/demo/math --model_name_or_path recipes/data/sums/model \\
        --train_file recipes/data/sums/train.jsonl --validation_file recipes/data/sums/test.jsonl \\
        --max_new_tokens 64 --num_candidates 8 --learning_rate 1e-3 --num_train_epochs 10 --instruction ""

The third line needs no download and no GPU. Rows hold `question` and `answer`, which ends with "#### " and the result;
a solution is right if math-verify finds it there. The output folder holds the model, its tokenizer and candidates/.
"""

import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from datasets import Dataset, load_dataset
from math_verify import parse, verify

from rsft_hf import RejectionSamplingTrainer, export_sft
from rsft_hf.presets import rft


@dataclass
class ScriptArguments:
    """Data, model and candidates."""

    dataset_name: str = field(default="openai/gsm8k", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it; main of gsm8k."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    question_column: str = field(default="question", metadata={"help": "Column of the problems."})
    answer_column: str = field(default="answer", metadata={"help": "Column of the solutions, or of the results alone."})
    instruction: str = field(
        default="Solve step by step, with each calculation as <<2+3=5>>. End with a line: #### result",
        metadata={"help": "Put before each problem."},
    )
    model_name_or_path: str = field(default="HuggingFaceTB/SmolLM2-360M-Instruct", metadata={"help": "Chat model."})
    max_train_samples: int = field(default=1000, metadata={"help": "Number of problems to train on."})
    max_eval_samples: int = field(default=200, metadata={"help": "Number of held-out problems."})
    num_candidates: int = field(default=16, metadata={"help": "Solutions per problem."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of the solutions."})
    max_new_tokens: int = field(default=320, metadata={"help": "Maximum length of a solution."})
    pass_at: int = field(default=4, metadata={"help": "k of pass@k: one of k solutions is right."})


def load_problems(script: ScriptArguments, split: str, file: str | None, num_rows: int, seed: int) -> Dataset:
    """Returns rows with `prompt` (a conversation) and `result` (text)."""
    if file is None:
        config = "main" if script.dataset_name == "openai/gsm8k" else None
        dataset = load_dataset(script.dataset_name, script.dataset_config or config, split=split)
    else:
        kind = "parquet" if file.endswith(".parquet") else "json"
        dataset = load_dataset(kind, data_files=file, split="train")
    columns = script.question_column, script.answer_column
    dataset = dataset.filter(lambda row: all(row[name] not in (None, "", []) for name in columns)).shuffle(seed)
    dataset = dataset.select(range(min(num_rows, len(dataset))))

    def as_prompt(row: dict[str, Any]) -> dict[str, Any]:
        question, answer = (row[name] for name in columns)
        turns = question if isinstance(question, list) else [{"role": "user", "content": question}]
        text = f"{script.instruction}\n\n{turns[-1]['content']}".strip()
        answer = answer[0] if isinstance(answer, list) else answer
        result = str(answer).split("####")[-1].strip()
        return {"prompt": [*turns[:-1], {**turns[-1], "content": text}], "result": result}

    return dataset.map(as_prompt, remove_columns=dataset.column_names)


def read(text: str, is_result: bool) -> list[Any]:
    """Returns what math-verify reads of a text; a result alone with LaTeX or letters to reckon with is a formula."""
    is_formula = re.search(r"\\[a-zA-Z]|[\^_{}]|\d[a-z]\b|\b[a-z]\s*[-+*/=]|[-+*/=]\s*[a-z]\b", text)
    is_bare = is_result and is_formula and "$" not in text and "\\boxed" not in text
    return parse(f"${text}$" if is_bare else text, parsing_timeout=None, raise_on_error=False)  # in any thread


def is_right(completions: list[Any], result: list[str], **columns: Any) -> list[float]:
    """Returns 1 for a solution with the right result, which stands behind "####", else the last number of it."""
    rewards = []
    for completion, true in zip(completions, result, strict=True):
        *others, text = completion[0]["content"].split("####")
        pair = read(true, is_result=True), read(text.strip(), is_result=bool(others))
        is_equal = text.strip() == true or verify(*pair, timeout_seconds=None, raise_on_error=False)
        rewards.append(float(is_equal))
    return rewards


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=2e-5, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set and model
    train = load_problems(script, script.train_split, script.train_file, script.max_train_samples, args.seed)
    test = load_problems(script, script.validation_split, script.validation_file, script.max_eval_samples, seed=0)
    tokenizer = hf.AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = hf.AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)

    # 2. Train: one round of candidates; right solutions with other equations are other rows
    sampling = {"do_sample": True, "temperature": script.temperature, "top_k": 0}
    resampler = rft(
        is_right,
        math.ceil(args.num_train_epochs),
        num_candidates=script.num_candidates,
        generation_config=hf.GenerationConfig(max_new_tokens=script.max_new_tokens, **sampling),
    )
    trainer = RejectionSamplingTrainer(
        model, args, train_dataset=train, processing_class=tokenizer, resampler=resampler
    )

    def evaluate(prefix: str) -> dict[str, float]:
        solutions = resampler.generate(trainer.model, tokenizer, test, seed=1)
        rewards = is_right([[{"content": one.text}] for one in solutions], [one.row["result"] for one in solutions])
        right = np.array(rewards).reshape(len(test), -1).sum(1).astype(int)
        n, k = script.num_candidates, min(script.pass_at, script.num_candidates)
        # The unbiased estimate of pass@k from n solutions: Chen et al. 2021, arXiv:2107.03374.
        at_k = [1 - math.comb(n - count, k) / math.comb(n, k) for count in right.tolist()]
        return {f"{prefix}_pass@1": float(right.mean() / n), f"{prefix}_pass@{k}": float(np.mean(at_k))}

    before = evaluate("before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 3. Evaluate and save
    after = evaluate("after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        export_sft(output / "candidates").to_json(str(output / "accepted.jsonl"))
        print(f"\n{'':10}{'before':>8}{'after':>8}")
        for (name, old), new in zip(before.items(), after.values(), strict=True):
            print(f"{name.removeprefix('before_'):10}{old:8.3f}{new:8.3f}")
        print(f"The model, candidates and accepted.jsonl are in {output.resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
