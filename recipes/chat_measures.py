"""What a chat model answers to held-out contexts, in figures: rewards, diversity, length, likeness to what people said.

In: a model and prompts. Out: its responses and their figures. Every arm is measured by this one class, during training
and after it, and with the same random streams.
"""

import math
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, TrainerCallback

from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.generative.candidates import PromptSet
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import Generator, Sampling
from rsft_hf.generative.metrics import distinct_n
from rsft_hf.rewards.functions import RewardFunctions
from rsft_hf.rewards.reference_rewards import ChrfReward

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
