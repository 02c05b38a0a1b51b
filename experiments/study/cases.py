"""Cases of the weighted study: rows of a regime and seed, the model they train, and how its predictions are counted.

Sources are read from the folder `RSFT_DATA` if it is set, from the hub otherwise, and tokenized once into a cache of
Parquet files. Rows to choose by are held out of the source's training rows; the test rows are read by `--split test`.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers as hf
from datasets import Dataset, load_dataset

from rsft_hf.training_set import example_lengths

IGNORED = -100
NUM_HELD, NUM_TEST, NUM_FROZEN = 1500, 3000, 4000


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        hub: Name on the hub, and configuration if it has several; None for files alone.
        files: File of each split inside the source's folder of `RSFT_DATA`.
        text, label: Columns.
        group: Column to break the accuracy down by; the label if None.
        max_length: Tokens of a row that are read.
        kind: "text" (one class per row), "token" (one per word), "causal" (the next token), "image".
    """

    hub: tuple[str, ...] | None
    files: dict[str, str]
    text: str = "text"
    label: str | None = "label"
    group: str | None = None
    max_length: int = 64
    kind: str = "text"


TEST = {"train": "train.parquet", "test": "test.parquet"}
SOURCES = {
    "imdb": Source(("stanfordnlp/imdb",), TEST, group="rating"),
    "snips": Source(None, TEST | {"test": "validate.parquet"}, "tokens", "intent", max_length=32),
    "ag_news": Source(("fancyzhx/ag_news",), {"train": "test.parquet"}),
    "wikiann": Source(("unimelb-nlp/wikiann", "en"), TEST, "tokens", "ner_tags", max_length=32, kind="token"),
    "captions": Source(
        ("bentrevett/multi30k",), TEST | {"test": "test_2016_flickr.parquet"}, "en", None, max_length=32, kind="causal"
    ),
    "digits": Source(None, {}, kind="image"),
}
FOLDERS = {"wikiann": "wikiann_en", "captions": "multi30k"}


@dataclass(frozen=True)
class Regime:
    """A situation in which the arms are compared.

    Attributes:
        source: Key of `SOURCES`.
        num_rows: Rows trained on, chosen by the seed.
        num_epochs: Epochs of the plain arm.
        score: What decides: "accuracy", "balanced" (mean recall of the classes) or "worst" (group).
        learning_rate: Peak of the learning rate.
        noise: Share of the rows whose label is changed.
        is_class_noise: Whether only the rows of half of the classes are changed, each class to one other.
        minority: Share of the rows that are of the last class; None for the source's own shares.
        is_frozen: Whether a small network is trained on the mean-pooled features of the frozen encoder.
    """

    source: str
    num_rows: int
    num_epochs: int
    score: str = "accuracy"
    learning_rate: float = 2e-4
    noise: float = 0.0
    is_class_noise: bool = False
    minority: float | None = None
    is_frozen: bool = False


REGIMES = {
    "few_snips": Regime("snips", 140, 15, learning_rate=3e-4),
    "few_ag_news": Regime("ag_news", 200, 12, learning_rate=3e-4),
    "few_imdb": Regime("imdb", 400, 8),
    "imbalance_imdb": Regime("imdb", 1000, 5, "balanced", minority=0.08),
    "imbalance_ag_news": Regime("ag_news", 1000, 5, "balanced", minority=0.03),
    "noise_snips": Regime("snips", 1000, 4, noise=0.15),
    "noise_ag_news": Regime("ag_news", 1000, 4, noise=0.15),
    "noise_imdb": Regime("imdb", 1500, 4, noise=0.15),
    "class_noise_snips": Regime("snips", 1000, 4, noise=0.15, is_class_noise=True),
    "class_noise_ag_news": Regime("ag_news", 1000, 4, noise=0.15, is_class_noise=True),
    "class_noise_imdb": Regime("imdb", 1500, 4, noise=0.15, is_class_noise=True),
    "noise_snips_long": Regime("snips", 1000, 12, noise=0.15),
    "noise_digits_long": Regime("digits", 800, 40, learning_rate=1e-3, noise=0.15),
    "groups_imdb": Regime("imdb", 2000, 3, "worst"),
    "groups_ag_news": Regime("ag_news", 1000, 3, "worst"),
    "groups_snips": Regime("snips", 500, 3, "worst"),
    "full_ag_news": Regime("ag_news", 4000, 3),
    "full_snips": Regime("snips", 4000, 2),
    "full_imdb": Regime("imdb", 4000, 2),
    "tokens_wikiann": Regime("wikiann", 1000, 4, "balanced"),
    "digits": Regime("digits", 800, 15, "balanced", learning_rate=1e-3, minority=0.02),
    "captions": Regime("captions", 2000, 3, learning_rate=1e-3),
}
FROZEN = {
    "few": {"num_rows": 200, "num_epochs": 20},
    "imbalance": {"num_rows": 1000, "num_epochs": 15, "minority": 0.05, "score": "balanced"},
    "noise": {"num_rows": 1000, "num_epochs": 15, "noise": 0.15},
    "class_noise": {"num_rows": 1000, "num_epochs": 15, "noise": 0.15, "is_class_noise": True},
    "groups": {"num_rows": 1000, "num_epochs": 6, "score": "worst"},
    "full": {"num_rows": NUM_FROZEN, "num_epochs": 4},
}
REGIMES |= {
    f"{subject}_{source}_frozen": Regime(source, **options, learning_rate=1e-3, is_frozen=True)
    for subject, options in FROZEN.items()
    for source in ("snips", "ag_news", "imdb")
}


@dataclass
class Case:
    """Rows of a regime and seed.

    Attributes:
        regime: The regime.
        seed: Fixes rows, noise, initial weights and order.
        train: Rows to train on, with `labels`.
        is_flipped: Whether a row's label was changed, shape (N,).
        evaluation: Rows to measure on.
        groups: Group of each of them.
        num_classes: Number of classes.
        model_path: Pretrained encoder of the text sources.
        pad: Id of the padding token.
    """

    regime: Regime
    seed: int
    train: Dataset
    is_flipped: np.ndarray
    evaluation: Dataset
    groups: np.ndarray
    num_classes: int
    model_path: str
    pad: int
    num_train_classes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        labels = np.concatenate([np.atleast_1d(row) for row in self.train["labels"][:]])
        self.num_train_classes = np.bincount(labels[labels != IGNORED], minlength=self.num_classes)

    @property
    def kind(self) -> str:
        return "features" if self.regime.is_frozen else SOURCES[self.regime.source].kind

    def without(self, rows: Any) -> "Case":
        """Returns the case without some of its training rows."""
        kept = np.setdiff1d(np.arange(len(self.train)), np.asarray(rows, dtype=int))
        return replace(self, train=self.train.select(kept), is_flipped=self.is_flipped[kept])

    def build_model(self) -> torch.nn.Module:
        """Returns the model with the seed's initial weights."""
        hf.set_seed(self.seed)
        if self.kind == "features":
            return FeatureClassifier(len(self.train["features"][0]), self.num_classes)
        if self.kind == "image":
            sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
            config = hf.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=self.num_classes, **sizes)
            return hf.ViTForImageClassification(config)
        if self.kind == "causal":
            sizes = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64}
            return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=self.num_classes, **sizes))
        auto = {"text": hf.AutoModelForSequenceClassification, "token": hf.AutoModelForTokenClassification}[self.kind]
        model = auto.from_pretrained(self.model_path, num_labels=self.num_classes, dtype=torch.float32)
        model.base_model.embeddings.requires_grad_(False)  # half of the parameters, seldom worth their time
        return model

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns a padded batch."""
        if self.kind in ("image", "features"):
            return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[value] * (width - len(row[name]))] for row in rows])

        batch = {"input_ids": padded("input_ids", self.pad)}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        is_class = self.kind == "text"
        batch["labels"] = torch.tensor([row["labels"] for row in rows]) if is_class else padded("labels", IGNORED)
        return batch


class FeatureClassifier(torch.nn.Module):
    """Two layers over features of a frozen encoder."""

    def __init__(self, num_features: int, num_classes: int, num_hidden: int = 256) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.LayerNorm(num_features), torch.nn.Dropout(0.1), torch.nn.Linear(num_features, num_hidden),
            torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(num_hidden, num_classes),
        )  # fmt: skip

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Returns logits and, of rows with labels, the mean cross entropy."""
        logits = self.layers(features)
        loss = {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        return loss | {"logits": logits}


def predicted(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Returns class and probability of the prediction, for `preprocess_logits_for_metrics`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    best = logits.float().softmax(-1).max(-1)
    return torch.stack([best.indices.float(), best.values], dim=-1)


def measures(case: Case, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns accuracy, mean recall of the classes, worst group, calibration error, and the number of classes used."""
    if case.kind == "causal":
        predictions, labels = predictions[:, :-1], labels[:, 1:]
    is_row = labels.ndim == 1
    kept = labels != IGNORED
    labels, classes, confidences = labels[kept], predictions[..., 0][kept].astype(int), predictions[..., 1][kept]
    is_right = classes == labels
    found = {"accuracy": float(is_right.mean())}
    if case.kind == "causal":
        return found
    recalls = [float(is_right[labels == one].mean()) for one in np.unique(labels)]
    found |= {"balanced": float(np.mean(recalls)), "classes": len(np.unique(classes))}
    bins = np.minimum((confidences * 15).astype(int), 14)
    gaps = [abs(is_right[bins == one].sum() - confidences[bins == one].sum()) for one in np.unique(bins)]
    found["ece"] = float(np.sum(gaps) / len(labels))
    if is_row:
        found["worst"] = min(float(is_right[case.groups == one].mean()) for one in np.unique(case.groups))
    return found


class Loader:
    """Loads cases; tokenized sources are kept in a folder.

    Args:
        cache: Folder of the tokenized sources.
        model_path: Pretrained encoder, whose tokenizer reads all text.
        split: "held" or "test".
    """

    def __init__(self, cache: Path, model_path: str, split: str) -> None:
        self.cache, self.model_path, self.split = cache, model_path, split

    @functools.cached_property
    def tokenizer(self) -> Any:
        return hf.AutoTokenizer.from_pretrained(self.model_path)

    @functools.cache  # noqa: B019 - one loader per process
    def tokens(self, name: str, split: str) -> Dataset:
        """Returns a split of a source with `input_ids`, `labels` and `group`."""
        return self._cached(f"{name}-{split}", lambda: digits() if name == "digits" else self._tokenized(name, split))

    def _cached(self, name: str, make: Callable[[], Dataset]) -> Dataset:
        path = self.cache / f"{name}.parquet"
        if not path.is_file():
            self.cache.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            make().to_parquet(draft)
            draft.replace(path)
        return Dataset(pq.read_table(path))

    def _tokenized(self, name: str, split: str) -> Dataset:
        source, folder = SOURCES[name], os.environ.get("RSFT_DATA")
        if folder:
            path = Path(folder) / FOLDERS.get(name, name) / source.files[split]
            rows = load_dataset("parquet", data_files=str(path), split="train")
        elif source.hub:
            rows = load_dataset(*source.hub, split="test" if name == "ag_news" else split)
        else:
            sys.exit(f"error: {name} has no hub name. Set RSFT_DATA to a folder with {name}/{source.files[split]}.")
        names = sorted(set(rows[source.label])) if source.label and source.kind == "text" else None
        columns = [column for column in (source.text, source.label, source.group) if column in rows.column_names]
        encode = functools.partial(self._encode, source, names)
        return rows.select_columns(columns).map(
            encode, batched=True, remove_columns=columns, load_from_cache_file=False
        )

    def _encode(self, source: Source, names: list | None, batch: dict[str, list]) -> dict[str, list]:
        texts = [row if isinstance(row, str) else " ".join(row) for row in batch[source.text]]
        options = {"truncation": True, "max_length": source.max_length}
        if source.kind == "token":
            return self._encode_words(batch[source.text], batch[source.label], options)
        ids = self.tokenizer([text[: 20 * source.max_length] for text in texts], **options)["input_ids"]
        if source.kind == "causal":
            return {"input_ids": ids, "labels": ids, "group": [0] * len(ids)}
        labels = [names.index(label) for label in batch[source.label]]
        return {"input_ids": ids, "labels": labels, "group": batch.get(source.group, labels)}

    def _encode_words(self, words: list[list[str]], tags: list[list[Any]], options: dict) -> dict[str, list]:
        """Labels the first token of each word; kinds of tags are sorted by name or number."""
        encoded, labels = self.tokenizer(words, is_split_into_words=True, **options), []
        for number, row in enumerate(tags):
            places = encoded.word_ids(number)
            first = [
                place is not None and place != before for before, place in zip([None, *places], places, strict=False)
            ]
            ids = [TAGS.index(tag) if isinstance(tag, str) else tag for tag in row]
            labels.append([ids[place] if new else IGNORED for new, place in zip(first, places, strict=True)])
        return {"input_ids": encoded["input_ids"], "labels": labels, "group": [0] * len(labels)}

    def splits(self, name: str) -> tuple[Dataset, Dataset]:
        """Returns the rows to train on and those to evaluate on; the same for every seed."""
        rows = self.tokens(name, "train")
        order = np.random.default_rng(0).permutation(len(rows))
        held, rest = order[:NUM_HELD], order[NUM_HELD:]
        if name == "digits":
            held, test, rest = order[:400], order[400:800], order[800:]
        elif "test" not in SOURCES[name].files:
            test, rest = rest[:2000], rest[2000:]
        if self.split == "held":
            return rows.select(rest), rows.select(held)
        if name == "digits" or "test" not in SOURCES[name].files:
            return rows.select(rest), rows.select(test)
        test_rows = self.tokens(name, "test")
        return rows.select(rest), test_rows.select(np.random.default_rng(1).permutation(len(test_rows))[:NUM_TEST])

    @functools.cache  # noqa: B019 - one loader per process
    def features(self, name: str) -> tuple[Dataset, Dataset]:
        """Returns some rows to train on and those to evaluate on, with features of the frozen encoder for tokens."""
        pool, evaluation = self.splits(name)
        some = pool.select(range(min(NUM_FROZEN, len(pool))))
        train = self._cached(f"{name}-train-features", lambda: self._featured(some))
        return train, self._cached(f"{name}-{self.split}-features", lambda: self._featured(evaluation))

    def _featured(self, rows: Dataset) -> Dataset:
        encoder = hf.AutoModel.from_pretrained(self.model_path).eval()
        order = np.argsort(example_lengths(rows, "length"))
        features: list[Any] = [None] * len(rows)
        for some in np.array_split(order, len(rows) // 64 + 1):
            ids = [torch.tensor(rows[int(row)]["input_ids"]) for row in some]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in ids]).unsqueeze(1)
            with torch.no_grad():
                states = encoder(padded, attention_mask=mask.long()).last_hidden_state * mask.unsqueeze(-1)
            for row, mean in zip(some, states.sum(1) / mask.sum(1, keepdim=True), strict=True):
                features[row] = mean.tolist()
        return rows.remove_columns("input_ids").add_column("features", features)

    def load(self, regime: Regime, seed: int) -> Case:
        """Returns the rows of a regime and seed."""
        pool, evaluation = self.features(regime.source) if regime.is_frozen else self.splits(regime.source)
        generator = np.random.default_rng(seed)
        kind = SOURCES[regime.source].kind
        if kind in ("text", "image"):
            labels = np.array(pool["labels"][:])
            num_classes = int(labels.max()) + 1
        else:
            labels, num_classes = None, len(TAGS) if kind == "token" else len(self.tokenizer)
        rows = choose(labels, len(pool), regime, num_classes, generator)
        train, is_flipped = pool.select(rows), np.zeros(len(rows), dtype=bool)
        if regime.noise:
            noisy, is_flipped = flipped(labels[rows], regime, num_classes, generator)
            train = train.remove_columns("labels").add_column("labels", noisy.tolist())
        groups = np.array(evaluation["group"][:])
        pad = self.tokenizer.pad_token_id if "input_ids" in train.column_names else 0
        train, evaluation = train.remove_columns("group"), evaluation.remove_columns("group")
        return Case(regime, seed, train, is_flipped, evaluation, groups, num_classes, self.model_path, pad)


TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


def digits() -> Dataset:
    """Handwritten digits of scikit-learn: 1,797 images of 8 by 8 points."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return Dataset.from_dict(
        {
            "pixel_values": (loaded.images[:, None] / 8 - 1).astype("float32").tolist(),
            "labels": loaded.target.tolist(),
            "group": loaded.target.tolist(),
        }
    )


def choose(labels: np.ndarray | None, num_rows: int, regime: Regime, num_classes: int, generator: Any) -> np.ndarray:
    """Returns the rows trained on, shape (N,)."""
    order = generator.permutation(num_rows)
    if regime.minority is None:
        return order[: regime.num_rows]
    is_rare = labels[order] == num_classes - 1
    num_rare = round(regime.minority * regime.num_rows)
    rows = np.concatenate([order[is_rare][:num_rare], order[~is_rare][: regime.num_rows - num_rare]])
    return generator.permutation(rows)


def flipped(labels: np.ndarray, regime: Regime, num_classes: int, generator: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels of which a share is changed, and which were changed.

    Class-dependent noise turns every other class into its successor, as annotators confuse neighbours.
    """
    count = round(regime.noise * len(labels))
    candidates = np.flatnonzero(labels % 2 == 0) if regime.is_class_noise else np.arange(len(labels))
    rows = generator.permutation(candidates)[:count]
    steps = np.ones(count, dtype=int) if regime.is_class_noise else generator.integers(1, num_classes, count)
    noisy, is_flipped = labels.copy(), np.zeros(len(labels), dtype=bool)
    noisy[rows], is_flipped[rows] = (labels[rows] + steps[: len(rows)]) % num_classes, True
    return noisy, is_flipped
