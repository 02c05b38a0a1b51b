"""Chatbot experiment: dialogues, prompts, rewards, and metrics of responses.

Prompts have `prompt` (messages, the last one the user's) and `references` (people's responses). Contexts to train on,
for the curve and for the final figures are disjoint.
"""

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import AutoModel, AutoTokenizer, GenerationConfig, TrainerCallback

from experiments.harness.arguments import ExperimentError, option
from experiments.harness.data import load_splits
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import Generator, Sampling
from rsft_hf.generative.metrics import distinct_n
from rsft_hf.generative.prompts import PromptSet
from rsft_hf.rewards.functions import RewardFunctions
from rsft_hf.rewards.model_rewards import RewardModel, SimilarityReward, load_reward_model
from rsft_hf.rewards.reference_rewards import ChrfReward
from rsft_hf.rewards.templates import Completion, Prompt
from rsft_hf.rewards.text_rewards import CopyPenalty, LengthWindow, RepetitionPenalty


@dataclass(frozen=True)
class ChatPrompts:
    """The contexts of an experiment.

    Attributes:
        train: All contexts that may be trained on.
        watched: Those of the curve, measured after every round.
        reported: Those of the final figures, measured once.
    """

    train: Dataset
    watched: Dataset
    reported: Dataset


def load_prompts(options: Any, tokenizer: Any) -> ChatPrompts:
    """Returns the contexts that are short enough for the model.

    Args:
        options: Has `dataset`, the names of the three splits, `max_turns`, `max_prompt_length`, `max_eval_contexts`
            and `max_test_contexts`.
        tokenizer: The chat model's.

    Raises:
        ExperimentError: If a split is missing, or none of its contexts is short enough.
    """
    encoder = Encoder(tokenizer, is_encoder_decoder=False)
    found: dict[str, Dataset] = {}
    seen: set[str] = set()
    for name in ("train_split", "eval_split", "test_split"):
        dialogues = load_dialogues(options.dataset, vars(options)[name], name)
        rows = {}
        for row in dialogues:
            messages = as_messages(row[CONTEXT], options.max_turns)
            if (key := repr(messages)) in seen or key in rows:  # a context stands in the first split that has it, once
                continue
            if len(encoder.prompt_ids(messages)) <= options.max_prompt_length:
                rows[key] = {"prompt": messages, REFERENCES: row[POSITIVE]}
        if not rows:
            raise ExperimentError(
                f"`--{name}` {vars(options)[name]!r} has no context of at most {options.max_prompt_length} tokens that "
                "is not in a split before it. Raise `--max_prompt_length`, or name another split."
            )
        seen |= set(rows)
        found[name] = Dataset.from_list(list(rows.values()))
    return ChatPrompts(
        found["train_split"],
        sample_rows(found["eval_split"], options.max_eval_contexts, seed=0),
        sample_rows(found["test_split"], options.max_test_contexts, seed=0),
    )


def supervised_rows(prompts: Dataset, tokenizer: Any) -> Dataset:
    """Returns every context with each of its human responses as token ids, the loss on the response alone."""
    encoder = Encoder(tokenizer, is_encoder_decoder=False)
    rows = []
    for row in prompts:
        prompt_ids = encoder.prompt_ids(row["prompt"])
        rows += [
            encoder.training_row(prompt_ids, encoder.completion_ids(row["prompt"], text)) for text in row[REFERENCES]
        ]
    return Dataset.from_list(rows)


REFERENCES = "references"


@dataclass(frozen=True)
class Responses:
    """The responses to some prompts and what was found of them.

    Attributes:
        texts: One response per prompt.
        judged: What the held-out judge said of each.
        metrics: Means over the prompts; `distinct_1` and `distinct_2` are of all words together.
    """

    texts: list[str]
    judged: list[float]
    metrics: dict[str, float]


@dataclass(frozen=True)
class ResponseMeter:
    """Measures models on the same prompts.

    Attributes:
        prompts: Rows with `prompt` (messages) and `references` (what people answered).
        tokenizer: The models' own.
        selecting: The rewards that select candidates in training.
        judge: The reward that selects nothing.
        generation_config: How responses are sampled, and after how many tokens they are cut off.
    """

    prompts: Dataset
    tokenizer: Any
    selecting: RewardFunctions
    judge: RewardFunctions
    generation_config: GenerationConfig

    def __call__(self, model: Any, is_greedy: bool = False) -> Responses:
        """Returns one response per prompt, sampled from the same streams for every model, and the figures of all.

        Args:
            model: The chat model.
            is_greedy: Take the most probable token at every step instead.
        """
        config = sampling_config(self.generation_config, model, self.tokenizer, is_greedy)
        generator = Generator(model, Encoder(self.tokenizer, is_encoder_decoder=False), GenerateEngine())
        found = generator(PromptSet(self.prompts, "prompt"), range(len(self.prompts)), Sampling(config, 1))
        responses = self.rate([one.text for one in found], [one.token_ids for one in found])
        truncated = sum(one.finish_reason == "length" for one in found) / len(found)
        return Responses(responses.texts, responses.judged, {**responses.metrics, "truncated": truncated})

    def rate(self, texts: list[str], token_ids: list[list[int]] | None = None) -> Responses:
        """Returns the figures of given responses, one for each prompt."""
        prompts, references = list(self.prompts["prompt"]), list(self.prompts[REFERENCES])
        completions: list[Any] = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [[] for _ in texts] if token_ids is None else token_ids
        columns = {REFERENCES: references}
        judged = self.judge(prompts, completions, ids, columns).rewards
        selecting = self.selecting(prompts, completions, ids, columns)
        chrf = ChrfReward(reference_column=REFERENCES)(prompts=prompts, completions=completions, **columns)
        words = [text.lower().split() for text in texts]
        metrics = {
            "held_out_reward": float(judged.mean()),
            "selecting_reward": float(selecting.rewards.nanmean()),
            **{name: float(values.nanmean()) for name, values in selecting.by_function.items()},
            "chrf": sum(chrf) / len(chrf),
            **{f"distinct_{n}": 0.0 if all(len(text) < n for text in words) else distinct_n(words, n) for n in (1, 2)},
            "unique_responses": len(set(texts)) / len(texts),
            "words": sum(map(len, words)) / len(words),
        }
        return Responses(texts, judged.tolist(), metrics)


class RoundCurve(TrainerCallback):
    """Measures the model before the first round and after each, and keeps the figures in the trainer's history.

    Args:
        meter: Measures on contexts that are neither trained on nor reported on at the end.
        num_draws: Rows that a round trains on.
        name: Of the run, for the line that is printed.
    """

    def __init__(self, meter: ResponseMeter, num_draws: int, name: str) -> None:
        self.meter, self.num_draws, self.name = meter, num_draws, name

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Measures the model that is begun with; a resumed run has done so."""
        if state.global_step == 0:
            self._measure(state, model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Measures after the last step of a round."""
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        number, steps_into_next = divmod(state.global_step, math.ceil(self.num_draws / rows_per_step))
        if steps_into_next == 0:
            self._measure(state, model, number)

    def _measure(self, state: Any, model: Any, number: int) -> None:
        metrics = self.meter(model).metrics
        # In the history, which checkpoints keep: a resumed run has the whole curve.
        state.log_history.append({"step": state.global_step, "measured_round": number, **metrics})
        if state.is_world_process_zero:
            print(
                f"{self.name}: round {number}, held-out reward {metrics['held_out_reward']:.3f}, selecting reward "
                f"{metrics['selecting_reward']:.3f}, distinct-2 {metrics['distinct_2']:.3f}",
                flush=True,
            )


def curve(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns the figures of every round, from 0, that `RoundCurve` has left in a trainer's history."""
    return [
        {"round": entry["measured_round"]}
        | {name: value for name, value in entry.items() if name not in ("step", "measured_round")}
        for entry in log_history
        if "measured_round" in entry
    ]


CONTEXT, POSITIVE = "context", "positive_responses"

ADVERSARIAL, RANDOM = "adversarial_negative_responses", "random_negative_responses"

COLUMNS = (CONTEXT, POSITIVE, ADVERSARIAL, RANDOM)

FEATURES = Features({name: List(Value("string")) for name in COLUMNS})

HALVES = ("a", "b")

Message = dict[str, str]


def load_dialogues(source: str, split: str, split_option: str = "train_split") -> Dataset:
    """Returns the dialogues of a split, with the columns `context`, `positive_responses` and the two of negatives.

    Args:
        source: What `experiments.harness.data.load_splits` takes.
        split: Name of the split, or several joined by "+".
        split_option: Name of the option that named the split, for the error.

    Returns:
        Rows of four lists of strings; where the data set has no negatives, their lists are empty.

    Raises:
        ExperimentError: If a split is missing or has no usable row, or its columns are in none of the three forms.
    """
    splits = load_splits(source)
    parts = []
    for name in split.split("+"):
        if name not in splits:
            raise ExperimentError(
                f"`--{split_option}` {name!r} is not in the data set. Use one of {', '.join(splits)}."
            )
        parts.append(_one_form(splits[name]).filter(is_usable))
        if len(parts[-1]) == 0:
            raise ExperimentError(f"`--{split_option}` {name!r} has no row with a context and a response to it.")
    return concatenate_datasets(parts)


def is_usable(row: dict[str, Any]) -> bool:
    """Returns whether a row has a context and a response, none of whose turns is empty."""
    return all(len(row[name]) > 0 and all(turn.strip() for turn in row[name]) for name in (CONTEXT, POSITIVE))


def _one_form(dataset: Dataset) -> Dataset:
    columns = dataset.column_names
    if CONTEXT in columns and POSITIVE in columns:
        lists = {name: dataset[name][:] if name in columns else [[]] * len(dataset) for name in COLUMNS}
        return Dataset.from_dict(lists, features=FEATURES)
    readers: dict[str, Callable[[Any], list[str]]] = {
        "dialog": list,
        "messages": lambda messages: [message["content"] for message in messages if message["role"] != "system"],
    }
    for column, turns_of in readers.items():
        if column in columns:
            turns = [turns_of(value) for value in dataset[column]]
            none: list[list[str]] = [[] for _ in turns]
            lists = {CONTEXT: [one[:-1] for one in turns], POSITIVE: [one[-1:] for one in turns]}
            return Dataset.from_dict({**lists, ADVERSARIAL: none, RANDOM: none}, features=FEATURES)
    raise ExperimentError(
        f"The data set has the columns {', '.join(columns)}. Dialogues need `{CONTEXT}` and `{POSITIVE}`, or `dialog`, "
        "or `messages`. Rename yours."
    )


def half_of(dialogues: Dataset, half: str) -> Dataset:
    """Returns one half of the dialogues, the same rows whatever their order; "all" is both halves.

    Rows with one first turn share a half: they are parts of one conversation, and halves must not overlap.
    """
    if half == "all":
        return dialogues
    wanted = HALVES.index(half)
    return dialogues.filter(lambda row: zlib.crc32(row[CONTEXT][0].strip().lower().encode()) % 2 == wanted)


def sample_rows(dialogues: Dataset, num_rows: int | None, seed: int) -> Dataset:
    """Returns so many rows chosen by the seed, in the order of the data set; all where there are fewer, or None."""
    if num_rows is None or num_rows >= len(dialogues):
        return dialogues
    return dialogues.select(sorted(random.Random(seed).sample(range(len(dialogues)), num_rows)))


def as_messages(turns: Sequence[str], max_turns: int | None = None) -> list[Message]:
    """Returns the last turns as a chat that the assistant is to go on with: roles alternate, the last is the user's.

    A chat template may refuse a chat that the assistant begins. With `max_turns` odd, the user begins every chat that
    is cut; without a cut, a context with an even number of turns is begun by the assistant.

    Example:
        >>> [message["role"] for message in as_messages(["Hi!", "Hello.", "How are you?"])]
        ['user', 'assistant', 'user']
    """
    kept = list(turns) if max_turns is None else list(turns)[-max_turns:]
    return [
        {"role": "user" if (len(kept) - number) % 2 else "assistant", "content": turn.strip()}
        for number, turn in enumerate(kept)
    ]


def judged_responses(dialogues: Dataset, seed: int, most_per_kind: int | None = None) -> list[dict[str, Any]]:
    """Returns one row per context and response: `messages` (the response last), `kind`, `label` and `context_id`.

    A context without random negatives is given as many as it has positive responses: those of other contexts, so that
    nothing but the context tells them from good ones.

    Args:
        dialogues: What `load_dialogues` returned.
        seed: Of the negatives, and of the choice among responses.
        most_per_kind: Keep so many responses of each kind and context, chosen by the seed; None keeps all.

    Returns:
        Rows with `kind` "positive", "adversarial" or "random", `label` 1.0 for positive and 0.0 for the others.
    """
    kinds = {"positive": POSITIVE, "adversarial": ADVERSARIAL, "random": RANDOM}
    everyone = [response for responses in dialogues[POSITIVE] for response in responses]
    generator = random.Random(seed)
    rows = []
    for number, dialogue in enumerate(dialogues):
        responses = {kind: dialogue[name] for kind, name in kinds.items()}
        own = responses["positive"]
        if not responses["random"]:
            drawn = generator.sample(everyone, min(len(everyone), 2 * len(own)))
            responses["random"] = [text for text in drawn if text not in own][: len(own)]
        context = as_messages(dialogue[CONTEXT])
        for kind, texts in responses.items():
            kept = texts if most_per_kind is None else generator.sample(texts, min(len(texts), most_per_kind))
            label = float(kind == "positive")
            rows += [
                {"messages": [*context, {"role": "assistant", "content": text}], "kind": kind, "label": label,
                 "context_id": number}
                for text in kept
            ]  # fmt: skip
    return rows


SHORTEST_COPY = 3  # words in a row that are taken from the context


@dataclass(frozen=True, eq=False)
class Relevance:
    """Probability, under a reward model with one logit, that the response belongs to its context, in (0, 1)."""

    model: RewardModel
    name: str = "relevance"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        """Returns the probability of each completion."""
        logits = self.model(prompts=prompts, completions=completions)
        return [(1 + math.tanh(logit / 2)) / 2 for logit in logits]  # the logistic function, without overflow


@dataclass
class ChatRewardArguments:
    """What selects the candidates, and what judges the outcome."""

    reward_model: str = option("outputs/reward_model_a", "Reward model that selects: a folder of reward_model.py.")
    judge_model: str = option("outputs/reward_model_b", "Reward model that only judges, trained on other data.")
    encoder: str = option("sentence-transformers/all-MiniLM-L6-v2", "Sentence encoder of the consistency reward.")
    relevance_weight: float = option(1.0, "Weight of the reward model's probability, in [0, 1].")
    consistency_weight: float = option(0.2, "Weight of the cosine of context and response; 0 loads no encoder.")
    novelty_weight: float = option(0.5, "Weight of the penalties for copied and for repeated words, in [-1, 0].")
    length_weight: float = option(0.2, "Weight of a length inside the window, in [0, 1].")
    min_words: int = option(4, "Shortest response inside the window.")
    max_words: int = option(25, "Longest response inside the window.")
    reward_batch_size: int = option(32, "Responses that a reward model reads at a time.")

    def __post_init__(self) -> None:
        if self.reward_model == self.judge_model:
            raise ExperimentError(
                f"`--judge_model` {self.judge_model!r} is the model that selects. Train a second one on the other half "
                "of the contexts: python -m experiments.reward_model --half b."
            )
        if not any(vars(self)[f"{name}_weight"] for name in ("relevance", "consistency", "novelty", "length")):
            raise ExperimentError("`--relevance_weight` and the other weights are all 0: nothing is left to select by.")
        if not 0 <= self.min_words <= self.max_words:
            raise ExperimentError(f"`--min_words` {self.min_words} must lie in [0, max_words], and max_words is "
                              f"{self.max_words}.")  # fmt: skip


def selecting_functions(options: ChatRewardArguments) -> tuple[list[Any], list[float]]:
    """Returns the reward functions that select, without those of weight 0, and their weights.

    Raises:
        ExperimentError: If a model cannot be loaded.
    """
    weighted: list[tuple[Any, float]] = []
    if options.relevance_weight:
        model = load_relevance(options.reward_model, "reward_model", options.reward_batch_size)
        weighted.append((model, options.relevance_weight))
    if options.consistency_weight:
        weighted.append((_load_consistency(options), options.consistency_weight))
    if options.novelty_weight:
        weighted.append((CopyPenalty(SHORTEST_COPY), options.novelty_weight))
        weighted.append((RepetitionPenalty(), options.novelty_weight))
    if options.length_weight:
        window = LengthWindow(options.min_words, options.max_words, ramp=max(1, options.min_words))
        weighted.append((window, options.length_weight))
    return [function for function, _ in weighted], [weight for _, weight in weighted]


def load_judge(options: ChatRewardArguments) -> RewardFunctions:
    """Returns the reward model that selects nothing, as a reward of its own."""
    return RewardFunctions([load_relevance(options.judge_model, "judge_model", options.reward_batch_size)])


def load_relevance(path: str, option_name: str, batch_size: int) -> Relevance:
    """Returns a saved reward model as a probability.

    Raises:
        ExperimentError: If there is none at `path`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = RewardModel(load_reward_model(path), tokenizer, batch_size)
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"`--{option_name}` {path!r} could not be loaded ({str(error).splitlines()[0]}). Train one with "
            "python -m experiments.reward_model, or give the folder or hub name of one."
        ) from error
    if tokenizer.chat_template is None:
        raise ExperimentError(f"`--{option_name}` {path!r} has no chat template: it cannot be asked about a dialogue.")
    return Relevance(model)


def _load_consistency(options: ChatRewardArguments) -> SimilarityReward:
    try:
        encoder, tokenizer = AutoModel.from_pretrained(options.encoder), AutoTokenizer.from_pretrained(options.encoder)
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"`--encoder` {options.encoder!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name, or do without: --consistency_weight 0."
        ) from error
    templates = ("{prompt}", "{completion}")
    return SimilarityReward(encoder, tokenizer, templates, options.reward_batch_size, name="consistency")
