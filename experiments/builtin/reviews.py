"""The builtin data set: short reviews from a seeded grammar, so that an experiment runs with no download.

In: how many rows and a seed. Out: rows `text`, `label` (0 negative, 1 positive), `phenomenon` (the outermost
construction). Every sentence is built together with its polarity by the combinators below, so the label is a law and
not an annotation: what counts is the writer's own final judgement. It knows no tokenizer, model or data-set library.

Words follow a Zipf law and constructions are unequally frequent: what a small model gets wrong is nested or rare.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

POSITIVE = (
    "good great excellent lovely superb brilliant charming delightful solid impressive wonderful clever elegant "
    "gripping memorable polished refreshing remarkable splendid thoughtful flawless graceful inspired marvellous "
    "radiant satisfying sublime tasteful winning exquisite"
).split()

NEGATIVE = (
    "bad poor awful dull terrible boring weak horrible clumsy disappointing tedious cheap sloppy dreadful forgettable "
    "grating lazy lifeless messy miserable shallow shoddy stale tiresome ugly uneven vapid wooden wretched dismal"
).split()

SUBJECTS = {
    "movie": "plot acting script ending soundtrack dialogue pacing camerawork villain humour opening editing".split(),
    "product": "battery screen keyboard packaging finish handle software strap speaker charger design manual".split(),
}

FACTS = {
    "movie": {
        True: ("the whole row stood up and clapped", "i bought a ticket for the next day too", "my kids still quote it",
               "i forgot to check the time", "nobody in the room coughed once", "we talked about it until midnight",
               "i cried twice and laughed more", "my father stayed awake for it", "they asked for it at breakfast"),
        False: ("half the row left before the end", "i wanted my money back", "my kids slept through it",
                "i checked the time every minute", "somebody in the room snored", "we forgot about it by midnight",
                "i yawned twice and sighed more", "my father went out for a smoke", "they asked to leave at once"),
    },
    "product": {
        True: ("it still runs after five years", "i bought two more for my mother", "it survived a fall downstairs",
               "my neighbour wants to borrow it", "it lasts for a week", "setup took one minute",
               "the first one never needed repair", "it works with gloves on", "i take it everywhere"),
        False: ("it stopped after five days", "i sent two of them back", "it broke on the first stair",
                "my neighbour wants it gone", "it dies before lunch", "setup took one month",
                "the third one needed repair too", "it works when it wants to", "i leave it in a drawer"),
    },
}  # fmt: skip

OPENERS = {
    "movie": ("I saw it on a train.", "We went on a rainy Tuesday.", "My sister chose it.", "It runs for two hours.",
              "I had read the book before.", "This was our third film of the week."),
    "product": ("It arrived on a Monday.", "I use it in the kitchen.", "My sister chose it.", "It comes in grey.",
                "I had an older one before.", "This was my third order of the week."),
}  # fmt: skip

HEDGES = {  # modifier -> whether the adjective's polarity survives it
    "hardly": False, "rather": True, "far from": False, "fairly": True, "barely": False, "really": True,
    "anything but": False, "nothing short of": True, "nowhere near": False, "never less than": True, "less than": False,
    "nothing if not": True, "only nominally": False,
}  # fmt: skip

DENIALS = ("i would not say that", "nobody could claim that", "it would be wrong to think that", "i never felt that")

WISHES = (
    "i wish the {s} were {a}",
    "if only the {s} were {a}",
    "the {s} could have been {a}",
    "they promised me {an_a} {s}",
)

HEARSAY = (
    "the critics called it {a}",
    "my boss found it {a}",
    "the poster calls it {a}",
    "everyone told me it was {a}",
)

FREQUENCIES = {
    "contrast": 30, "plain": 16, "negation": 13, "hedge": 11, "hearsay": 10, "double_negation": 8, "comparison": 5,
    "counterfactual": 4, "sarcasm": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Clause:
    """A statement in lower case and the judgement it expresses."""

    text: str
    is_positive: bool


def state(subject: str, adjective: str) -> Clause:
    """Returns "the plot is dull"; the polarity is the adjective's.

    >>> state("plot", "dull")
    Clause(text='the plot is dull', is_positive=False)
    """
    return Clause(f"the {subject} is {adjective}", adjective in POSITIVE)


def negate(subject: str, adjective: str) -> Clause:
    """Returns "the plot is not dull"; the adjective's polarity is reversed."""
    return Clause(f"the {subject} is not {adjective}", adjective not in POSITIVE)


def hedge(subject: str, modifier: str, adjective: str) -> Clause:
    """Returns "the plot is hardly dull"; `HEDGES` tells whether the modifier keeps or reverses the polarity."""
    return Clause(f"the {subject} is {modifier} {adjective}", (adjective in POSITIVE) == HEDGES[modifier])


def deny(denial: str, clause: Clause) -> Clause:
    """Returns "nobody could claim that ..."; reverses any clause, so a negated one comes out as it began."""
    return Clause(f"{denial} {clause.text}", not clause.is_positive)


def contrast(conceded: Clause, asserted: Clause, form: str) -> Clause:
    """Returns the two clauses joined so that only `asserted` counts; `form` places it first or last.

    >>> contrast(state("plot", "dull"), state("acting", "superb"), "{conceded}, but {asserted}")
    Clause(text='the plot is dull, but the acting is superb', is_positive=True)
    """
    return Clause(form.format(conceded=conceded.text, asserted=asserted.text), asserted.is_positive)


CONTRASTS = (
    "{conceded}, but {asserted}", "although {conceded}, {asserted}", "{asserted}, although {conceded}",
    "{conceded}, and yet {asserted}", "{asserted}, even if {conceded}",
)  # fmt: skip


def compare(subject: str, is_better: bool, adjective: str) -> Clause:
    """Returns "the plot is worse than the superb one before it"; the adjective is the other's and does not count."""
    return Clause(
        f"the {subject} is {'better' if is_better else 'worse'} than the {adjective} one before it", is_better
    )


def wish(form: str, subject: str, adjective: str) -> Clause:
    """Returns "i wish the plot were clever"; what is wished for, or was promised, is what is missing."""
    return Clause(form.format(s=subject, a=adjective, an_a=_with_article(adjective)), adjective not in POSITIVE)


def exclaim(subject: str, adjective: str, fact: str, fact_is_positive: bool) -> Clause:
    """Returns "what a superb plot, somebody snored"; the fact decides, so praise before a bad fact is sarcasm."""
    return Clause(f"what {_with_article(adjective)} {subject}, {fact}", fact_is_positive)


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _zipf(rng: random.Random, words: Sequence[str]) -> str:
    """Returns one word, the k-th with probability proportional to 1 / (k + 3): the tail stays rare, as in real text."""
    return rng.choices(words, weights=[1 / (k + 3) for k in range(len(words))])[0]


def _adjective(rng: random.Random) -> str:
    return _zipf(rng, POSITIVE if rng.random() < 0.5 else NEGATIVE)


def _simple(rng: random.Random, subject: str) -> Clause:
    """Returns a plain, negated or hedged clause: what the larger constructions are made of."""
    kind = rng.choices(("plain", "negation", "hedge"), weights=(5, 3, 2))[0]
    return _construct(rng, kind, [subject])


def _construct(rng: random.Random, phenomenon: str, subjects: Sequence[str]) -> Clause:
    """Returns one random clause of the given construction about the given subjects."""
    adjective = _adjective(rng)
    match phenomenon:
        case "plain":
            return state(subjects[0], adjective)
        case "negation":
            return negate(subjects[0], adjective)
        case "hedge":
            return hedge(subjects[0], _zipf(rng, list(HEDGES)), adjective)
        case "contrast":
            conceded, asserted = _simple(rng, subjects[0]), _simple(rng, subjects[1])
            while asserted.is_positive == conceded.is_positive:
                asserted = _simple(rng, subjects[1])
            return contrast(conceded, asserted, rng.choice(CONTRASTS))
        case "double_negation":
            return deny(rng.choice(DENIALS), negate(subjects[0], adjective))
        case "hearsay":
            own, other = _simple(rng, subjects[0]), rng.choice(HEARSAY).format(a=adjective)
            return Clause(rng.choice((f"{other}, {own.text}", f"{own.text}, {other}")), own.is_positive)
        case "comparison":
            return compare(subjects[0], rng.random() < 0.5, adjective)
        case "counterfactual":
            return wish(rng.choice(WISHES), subjects[0], adjective)
        case _:
            raise ValueError(f"Unknown phenomenon {phenomenon!r}. Use one of {sorted(FREQUENCIES)}.")


def _sarcasm(rng: random.Random, domain: str, subject: str) -> Clause:
    """Returns an exclamation that is sarcastic three times in four: fact and adjective disagree."""
    fact_is_positive = rng.random() < 0.5
    is_sincere = rng.random() < 0.25
    adjectives = POSITIVE if fact_is_positive == is_sincere else NEGATIVE
    return exclaim(subject, _zipf(rng, adjectives), _zipf(rng, FACTS[domain][fact_is_positive]), fact_is_positive)


def write_review(rng: random.Random) -> dict:
    """Returns one row: a clause in sentence case, after a neutral opening sentence in every third review."""
    domain = rng.choice(list(SUBJECTS))
    phenomenon = rng.choices(list(FREQUENCIES), weights=list(FREQUENCIES.values()))[0]
    subjects = rng.sample(SUBJECTS[domain], 2)
    is_exclamation = phenomenon == "sarcasm"
    clause = _sarcasm(rng, domain, subjects[0]) if is_exclamation else _construct(rng, phenomenon, subjects)
    text = clause.text[0].upper() + clause.text[1:] + "."
    if rng.random() < 1 / 3:
        text = f"{rng.choice(OPENERS[domain])} {text}"
    return {"text": text, "label": int(clause.is_positive), "phenomenon": phenomenon}


def make_reviews(num_train: int = 4000, num_test: int = 1000, seed: int = 0) -> dict[str, list[dict]]:
    """Returns the splits "train" and "test": balanced labels up to one row, no text twice, the same for the same seed.

    Raises:
        ValueError: If a split is empty, or the grammar has too few distinct short reviews left.
    """
    if num_train < 1 or num_test < 1:
        raise ValueError(f"`num_train`={num_train} and `num_test`={num_test} must both be at least 1.")
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {}
    for split, num_rows in (("train", num_train), ("test", num_test)):
        rows = []
        for _attempt in range(50 * num_rows):
            row = write_review(rng)
            # Reject the wrong label or a known text; labels alternate, so each split stays balanced.
            if row["label"] == len(rows) % 2 and row["text"] not in seen:
                seen.add(row["text"])
                rows.append(row)
            if len(rows) == num_rows:
                break
        else:
            raise ValueError(
                f"Only {len(rows)} distinct reviews found after {50 * num_rows} draws; `num_{split}`={num_rows} "
                "is too many for this grammar. Ask for fewer rows."
            )
        rng.shuffle(rows)
        splits[split] = rows
    return splits


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

MAX_POSITIONS = 512


def build_tokenizer(texts: Iterable[str], vocabulary_size: int = 20_000) -> PreTrainedTokenizerFast:
    """Returns a lower-casing word-level tokenizer whose vocabulary is the most frequent words of the texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, num_labels: int, seed: int) -> BertForSequenceClassification:
    """Returns a randomly initialised two-layer BERT of width 96; the same seed gives the same weights."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
    )
    set_seed(seed)
    return BertForSequenceClassification(config)
