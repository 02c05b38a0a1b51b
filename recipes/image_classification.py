"""Fine-tune an image classifier where some classes are rare: classes are drawn alike, and within them by the losses.

    python recipes/image_classification.py --output_dir outputs/images             # CIFAR-10, ViT: wants a GPU
    python recipes/image_classification.py --output_dir outputs/mine --image_folder photos

    python recipes/image_classification.py --output_dir outputs/demo/digits --digits True \\
        --num_train_epochs 15 --learning_rate 1e-3 --per_device_train_batch_size 32

The third line needs no download and no GPU: the digits of scikit-learn, of which the last three classes keep one row in
eight, and a small ViT from random weights. `photos` holds a folder per class, in train/ and test/. The output folder
holds the model and its image processor, where `pipeline("image-classification", folder)` finds them.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from rsft_hf import ClassBalanced, LossResampler, RejectionSamplingTrainer


@dataclass
class ScriptArguments:
    """Data, model and weighting."""

    dataset_name: str = field(default="uoft-cs/cifar10", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder of images, instead of `dataset_name`."})
    digits: bool = field(default=False, metadata={"help": "The digits of scikit-learn and a small model, offline."})
    image_column: str = field(default="img", metadata={"help": "Column of the images (`image` in a folder)."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or integers."})
    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "Pretrained image model."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training rows, chosen at random."})
    class_balanced: bool = field(default=True, metadata={"help": "Draw each class as often as the others."})


def unbalanced_digits(seed: int) -> DatasetDict:
    """Returns digits of 8 x 8 pixels; of 7, 8 and 9 one in eight is kept for training."""
    digits = load_digits()
    labels = ClassLabel(names=[str(number) for number in range(10)])
    pixels = [(image * 15.9375).astype(np.uint8) for image in digits.images]
    features = Features({"img": Image(), "label": labels})
    rows = Dataset.from_dict({"img": pixels, "label": digits.target.tolist()}, features)
    splits = rows.train_test_split(0.3, seed=seed)
    counts, kept = Counter(), []
    for row, label in enumerate(splits["train"]["label"]):
        counts[label] += 1
        if label < 7 or counts[label] % 8 == 0:
            kept.append(row)
    return DatasetDict(train=splits["train"].select(kept), test=splits["test"])


def compute_metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
    """Returns accuracy, balanced accuracy (the mean over classes), and the recall of the worst class."""
    classes, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, classes)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, classes)),
        "worst_class": float(min(recall_score(labels, classes, average=None, labels=sorted(set(labels.tolist()))))),
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=2e-5, per_device_train_batch_size=32, save_total_limit=1)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", remove_unused_columns=False)
    script, args = parser.parse_args_into_dataclasses(argv)
    hf.set_seed(args.seed)

    # 1. Data set
    splits = {"train": script.train_split, "test": script.validation_split}
    if script.digits:
        splits = unbalanced_digits(args.seed)
    elif script.image_folder is not None:
        splits, script.image_column = load_dataset("imagefolder", data_dir=script.image_folder, split=splits), "image"
    else:
        splits = load_dataset(script.dataset_name, script.dataset_config, split=splits)
    splits, column = DatasetDict(splits), script.label_column
    if not isinstance(splits["train"].features[column], ClassLabel):
        splits = splits.cast_column(column, Value("string"))
        splits["train"] = splits["train"].class_encode_column(column)
        splits["test"] = splits["test"].cast_column(column, splits["train"].features[column])
    if script.max_train_samples is not None and script.max_train_samples < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(args.seed).select(range(script.max_train_samples))

    # 2. Model: pixels are prepared when a row is read
    names = splits["train"].features[column].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    if script.digits:
        size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
        model = hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=2, num_labels=10, **size, **labels))
        processor = hf.ViTImageProcessor(size={"height": 8, "width": 8})
    else:
        processor = hf.AutoImageProcessor.from_pretrained(script.model_name_or_path)
        model = hf.AutoModelForImageClassification.from_pretrained(
            script.model_name_or_path, ignore_mismatched_sizes=True, **labels
        )

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = batch[script.image_column]
        if deep := [image.mode for image in images if image.mode[0] in "IF" and image.getextrema()[1] > 255]:
            raise ValueError(f"An image has the mode {deep[0]}, which RGB would cut off. Scale it to 8 bits.")
        images = [image.convert("RGB") for image in images]
        return {**processor(images, return_tensors="pt"), "labels": batch[column]}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    splits = splits.with_transform(prepare)

    # 3. Train
    rule = {"weighting": ClassBalanced(), "losses": "training", "warmup_epochs": 1} if script.class_balanced else {}
    resampler, data = LossResampler(**rule), {"train_dataset": splits["train"], "eval_dataset": splits["test"]}
    keywords = {"compute_metrics": compute_metrics, "processing_class": processor, "resampler": resampler}
    trainer = RejectionSamplingTrainer(model, args, collate, **data, **keywords)
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 4. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{'':18}{'before':>8}{'after':>8}")
        for name in ("accuracy", "balanced_accuracy", "worst_class"):
            print(f"{name:18}{before[f'before_{name}']:8.3f}{after[f'after_{name}']:8.3f}")
        print(f"The model is in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
