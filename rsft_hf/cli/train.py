"""`rsft-hf generate` and `rsft-hf train`: a model, a data set and a resampler from options by name."""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsft_hf.cli.options import (
    DATA,
    GENERATION,
    LISTS,
    TRAINING,
    described,
    given_pairs,
    joined,
    read_config,
    resolved,
    split_options,
    value_of,
)

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate`."""
    parser.add_argument("directory", type=Path, help="folder to write: absent, empty, or of a call that was killed")
    parser.add_argument("--config", type=Path, help="YAML file of options by name; the command line overrides it")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="of the candidates (default: 42)")
    parser.usage = "rsft-hf generate DIRECTORY [--config FILE] [--OPTION VALUE ...]"
    texts = described("CandidateResampler")
    _add(parser, "model and data", DATA)
    _add(parser, "candidates", {name: texts[name] for name in GENERATION})


def add_train(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `train`, without those of the training arguments."""
    parser.add_argument("--config", type=Path, help="YAML file of options by name; the command line overrides it")
    parser.add_argument("--help-all", action="store_true", help="show the training arguments, too, and exit")
    generative, weighted = described("CandidateResampler"), described("LossResampler")
    _add(parser, "model and data", TRAINING | DATA)
    _add(parser, "both resamplers", {name: generative[name] for name in generative if name in weighted})
    _add(parser, "CandidateResampler", {name: generative[name] for name in generative if name not in weighted})
    _add(parser, "LossResampler", {name: weighted[name] for name in weighted if name not in generative})
    parser.usage = "rsft-hf train [--config FILE] [--OPTION VALUE ...]"
    parser.epilog = "All other options are those of TRL's SFTConfig, or of Seq2SeqTrainingArguments: --help-all."


def _add(parser: argparse.ArgumentParser, title: str, options: Mapping[str, str]) -> None:
    group = parser.add_argument_group(title)
    for name, text in options.items():
        words = text[0].lower() + text[1:] if re.match(r"[A-Z][a-z]* ", text) else text
        shown = words.rstrip(".").replace("%", "%%")
        number = "+" if name in LISTS else None
        group.add_argument(f"--{name}", nargs=number, metavar="VALUE", default=argparse.SUPPRESS, help=shown)


def generate(options: argparse.Namespace) -> str:
    """Generates candidates into a folder."""
    from rsft_hf.distributed import launched_processes
    from rsft_hf.generative import generate_candidates, load_candidates

    given = _given(options, {})
    seed = given.pop("seed", 42)
    is_encoder_decoder = _is_encoder_decoder(given)
    # Only a file may hold training arguments, too; without one nothing of TRL is needed here.
    names = _argument_names(is_encoder_decoder) if options.config is not None else []
    _, groups = split_options({"resampler": "CandidateResampler", **given}, names)
    data, sampling = groups["data"], resolved({name: groups["resampler"].get(name) for name in GENERATION})
    column = sampling.pop("prompt_column") or "prompt"
    rows, _ = _load_data(data, seed)
    if column != "prompt":  # which no reward reads under its own name
        rows = rows.remove_columns([name for name in rows.column_names if name == "prompt"])
        rows = rows.rename_column(column, "prompt")
    model, tokenizer = _load_model(data, is_encoder_decoder)
    model.to(launched_processes().device)
    arguments = {name: value for name, value in sampling.items() if value is not None}
    folder = generate_candidates(model, tokenizer, rows, options.directory, seed=seed, **arguments)
    stored = load_candidates(folder)
    return f"{len(stored)} candidates of {len(stored.unique('prompt_id'))} prompts are in {folder}"


def train(options: argparse.Namespace, rest: list[str]) -> str:
    """Trains a model: decoder-only by TRL's SFTTrainer, encoder-decoder by Seq2SeqTrainer."""
    import rsft_hf

    given = _given(options, given_pairs(rest))
    is_encoder_decoder = _is_encoder_decoder(given)
    name, groups = split_options(given, _argument_names(is_encoder_decoder))
    if "output_dir" not in groups["args"]:
        raise ValueError("`output_dir` is missing: the folder for checkpoints and the trained model.")
    resume = groups["args"].pop("resume_from_checkpoint", None)
    data, keywords = groups["data"], resolved(groups["resampler"])
    args = _training_arguments(is_encoder_decoder, groups["args"])
    keywords = _load_models(keywords)
    resampler = getattr(rsft_hf, name)(**keywords)
    trainer = _trainer(data, resampler, args, is_encoder_decoder)
    before = trainer.evaluate(metric_key_prefix="before") if trainer.eval_dataset is not None else {}
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate(metric_key_prefix="after") if trainer.eval_dataset is not None else {}
    trainer.save_model()
    trainer.create_model_card()
    lines = [f"{'':36}{'before':>12}{'after':>12}"] if before else []
    for figure in sorted(key.removeprefix("before_") for key in before):
        if not figure.endswith(("runtime", "per_second", "_time")) and f"after_{figure}" in after:
            lines.append(f"{figure:36}{before[f'before_{figure}']:12.4g}{after[f'after_{figure}']:12.4g}")
    return "\n".join([*lines, f"The model is in {args.output_dir}"])


def help_all() -> str:
    """Returns the help of `train` with the training arguments."""
    from transformers import HfArgumentParser

    parser = argparse.ArgumentParser("rsft-hf train", add_help=False)
    add_train(parser)
    other: Any = HfArgumentParser(_arguments_class(is_encoder_decoder=False))
    other.usage = argparse.SUPPRESS
    return f"{parser.format_help()}\ntraining arguments:\n{other.format_help()}"


def _given(options: argparse.Namespace, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the file, overridden by those of the command line."""
    own = {"command", "run", "config", "help_all", "directory"}
    words = {name: value for name, value in vars(options).items() if name not in own}
    line = {name: value_of(value) if isinstance(value, str) else value for name, value in words.items()}
    line |= {name: joined(value) for name, value in words.items() if isinstance(value, list)}
    given, line = read_config(options.config) if options.config is not None else {}, line | dict(rest)
    for source, others in _SOURCES.items():  # rows given on the line take the place of the file's
        if source in line:
            given = {name: value for name, value in given.items() if name not in others}
    return given | line


_SOURCES = {
    "train_file": ("dataset_name", "dataset_config", "train_split", "validation_split"),
    "dataset_name": ("train_file", "validation_file"),
}


def _arguments_class(is_encoder_decoder: bool) -> Any:
    if is_encoder_decoder:
        from transformers import Seq2SeqTrainingArguments

        return Seq2SeqTrainingArguments
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise ImportError("Decoder-only models are trained by TRL's SFTTrainer: pip install rsft-hf[trl].") from error
    return SFTConfig


def _training_arguments(is_encoder_decoder: bool, given: dict[str, Any]) -> Any:
    import torch

    for field in dataclasses.fields(_arguments_class(is_encoder_decoder)):
        is_number = isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
        if is_number and isinstance(given.get(field.name), str):
            raise ValueError(f"`{field.name}`={given[field.name]!r} is no number.")
        if field.name.endswith("_strategy") and given.get(field.name) is False:
            given = given | {field.name: "no"}  # which YAML reads as false
    if not torch.accelerator.is_available():
        given = {"bf16": False} | given  # which SFTConfig switches on, and a CPU may not have
    return _arguments_class(is_encoder_decoder)(**given)


def _argument_names(is_encoder_decoder: bool) -> list[str]:
    return [one.name for one in dataclasses.fields(_arguments_class(is_encoder_decoder)) if one.init]


def _is_encoder_decoder(given: Mapping[str, Any]) -> bool:
    from transformers import AutoConfig

    if not given.get("model_name_or_path"):
        raise ValueError("`model_name_or_path` is missing: name or folder of the model.")
    try:
        config = AutoConfig.from_pretrained(given["model_name_or_path"])
    except OSError as error:
        raise OSError(f"`model_name_or_path`={given['model_name_or_path']!r} cannot be loaded. {error}") from error
    return bool(getattr(config, "is_encoder_decoder", False))


def _load_model(data: Mapping[str, Any], is_encoder_decoder: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    load: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    path, dtype = data["model_name_or_path"], data.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype`={dtype!r} is none of {', '.join(_DTYPES)}.")
    _check_integer("lora_r", data.get("lora_r", 0), 0)
    model = load.from_pretrained(path, dtype=dtype)
    for name, values in model.named_parameters():
        if name in (model._keys_to_ignore_on_save or ()):
            values.requires_grad_(False)  # Marian's positions: fixed, and saved in no checkpoint
    if data.get("lora_r", 0):
        from peft import LoraConfig, get_peft_model

        rank = data["lora_r"]
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return model, AutoTokenizer.from_pretrained(path)


def _check_integer(name: str, value: Any, minimum: int) -> None:
    from rsft_hf.checks import check_integer

    check_integer(name, value, minimum)


def _load_models(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a resampler with models and rows loaded that are named."""
    for name in ("proposal_model", "reference_model"):
        if isinstance(keywords.get(name), str) and keywords[name] != "base":
            named = {"model_name_or_path": keywords[name]}
            keywords[name], _ = _load_model(named, _is_encoder_decoder(named))
    if isinstance(keywords.get("supervised_dataset"), str):
        keywords["supervised_dataset"] = _file(keywords["supervised_dataset"], "supervised_dataset")
    return keywords


def _load_data(data: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """Rows to train on, and held-out rows or None."""
    import datasets

    name, file = data.get("dataset_name"), data.get("train_file")
    if (name is None) == (file is None):
        raise ValueError("Give the rows by `train_file` or by `dataset_name`, one of them.")
    held_out = None
    if file is not None:
        rows = _file(file, "train_file")
        if data.get("validation_file") is not None:
            held_out = _file(data["validation_file"], "validation_file")
    else:
        rows = datasets.load_dataset(name, data.get("dataset_config"), split=data.get("train_split", "train"))
        if data.get("validation_split") is not None:
            held_out = datasets.load_dataset(name, data.get("dataset_config"), split=data["validation_split"])
    if (count := data.get("max_train_samples")) is not None:
        _check_integer("max_train_samples", count, 1)
    if count is not None and count < len(rows):
        rows = rows.shuffle(seed).select(range(count))
    return rows, held_out


def _file(path: str, option: str) -> Any:
    import datasets

    if not Path(path).is_file():
        raise FileNotFoundError(f"`{option}`={path!r} is no file.")
    if Path(path).suffix not in _BUILDERS:
        raise ValueError(f"`{option}`={path!r} is none of {', '.join(_BUILDERS)}.")
    return datasets.load_dataset(_BUILDERS[Path(path).suffix], data_files=path, split="train")


def _trainer(data: Mapping[str, Any], resampler: Any, args: Any, is_encoder_decoder: bool) -> Any:
    from transformers import DataCollatorForSeq2Seq, set_seed

    from rsft_hf import CandidateResampler, RejectionSamplingMixin, RejectionSamplingSeq2SeqTrainer

    set_seed(args.seed)
    rows, held_out = _load_data(data, args.seed)
    model, tokenizer = _load_model(data, is_encoder_decoder)
    held_out = _without_long(held_out, tokenizer, resampler, is_encoder_decoder)
    keywords = {"processing_class": tokenizer, "resampler": resampler}
    if not is_encoder_decoder:
        from trl import SFTTrainer

        made: Any = type("RejectionSamplingSFTTrainer", (RejectionSamplingMixin, SFTTrainer), {})
        return made(model, args, train_dataset=rows, eval_dataset=held_out, **keywords)
    if not isinstance(resampler, CandidateResampler):
        rows, held_out = (_encoded(one, tokenizer) for one in (rows, held_out))
        keywords["data_collator"] = DataCollatorForSeq2Seq(tokenizer, model)
    return RejectionSamplingSeq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=held_out, **keywords)


def _without_long(held_out: Any, tokenizer: Any, resampler: Any, is_encoder_decoder: bool) -> Any:
    """The held-out prompts without those that would be dropped from the training set."""
    from rsft_hf import CandidateResampler
    from rsft_hf.generative import drop_long_prompts

    config = resampler.config if isinstance(resampler, CandidateResampler) else None
    if held_out is None or config is None or config.max_prompt_length is None or config.on_long_prompt != "drop":
        return held_out
    template = config.prompt_column, config.chat_template_kwargs
    return drop_long_prompts(held_out, tokenizer, config.max_prompt_length, *template, is_encoder_decoder)


def _encoded(rows: Any, tokenizer: Any) -> Any:
    """Rows with `prompt` and `completion` as an encoder-decoder model reads them."""
    if rows is None:
        return None
    if missing := {"prompt", "completion"} - set(rows.column_names):
        raise ValueError(f"The rows lack the columns {sorted(missing)}; they have {rows.column_names}.")
    encode = lambda row: tokenizer(row["prompt"], text_target=row["completion"])  # noqa: E731 - a mapped function
    return rows.map(encode, remove_columns=rows.column_names)
