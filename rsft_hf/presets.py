"""Published methods as functions that return a configured resampler; every option can still be given.

What a paper leaves to its training (learning rates, decoding temperatures, epochs) is left to `TrainingArguments` and
`generation_config` here. So is how many rows are trained on: as many as there are prompts by default. ReST-EM and RFT
train on all that they accept, several to a prompt: `num_draws` is their number at most.
"""

from typing import Any

from rsft_hf.acceptance import RSO, PerPromptCap, Sequence, Threshold, TopKPerPrompt
from rsft_hf.generative import CandidateResampler, Deduplicate
from rsft_hf.generative.filters import solution_equations
from rsft_hf.predictive import PredictionResampler, Sharpened
from rsft_hf.weighted import ErrorSet, LossResampler


def raft(reward_funcs: Any, **options: Any) -> CandidateResampler:
    """RAFT: the best of K answers to each prompt, from the last weights. Dong et al. 2023, arXiv:2304.06767.

    Args:
        reward_funcs: As in `CandidateResampler`, in practice a reward model.
        **options: Of `CandidateResampler`; `num_candidates` is K.

    Example:
        >>> raft(lambda completions, **columns: [float(len(text)) for text in completions]).config.acceptance
        TopKPerPrompt()
    """
    defaults: dict[str, Any] = {"acceptance": TopKPerPrompt(1), "round_start": "last"}
    return CandidateResampler(reward_funcs, **defaults | options)


def llama2(reward_funcs: Any, num_rounds: int, **options: Any) -> CandidateResampler:
    """Rejection sampling of Llama 2: the best answers of all rounds so far. Touvron et al. 2023, arXiv:2307.09288.

    Training on the last round alone forgot skills there, which the best answers of all earlier rounds mended.

    Args:
        reward_funcs: As in `CandidateResampler`.
        num_rounds: Rounds of the run, at least 1.
        **options: Of `CandidateResampler`.
    """
    defaults: dict[str, Any] = {"acceptance": TopKPerPrompt(1), "round_start": "last", "replay_rounds": num_rounds - 1}
    return CandidateResampler(reward_funcs, **defaults | options)


def rest_em(reward_funcs: Any, max_per_prompt: int = 10, **options: Any) -> CandidateResampler:
    """ReST-EM: right answers, at most ten per prompt, every round from the base. Singh et al. 2023, arXiv:2312.06585.

    Args:
        reward_funcs: A verifier, above 0 for a right answer.
        max_per_prompt: Maximum number of answers to one prompt, so that easy prompts do not prevail.
        **options: Of `CandidateResampler`; the paper samples 32 candidates for mathematics, 64 for code.
    """
    rule = Sequence(Threshold(minimum=0.0), PerPromptCap(max_per_prompt))
    defaults: dict[str, Any] = {"acceptance": rule, "num_candidates": 32, "round_start": "base"}
    return CandidateResampler(reward_funcs, **defaults | options)


def star(reward_funcs: Any, **options: Any) -> CandidateResampler:
    """STaR without rationalisation: one answer, kept if right, from the base. Zelikman et al. 2022, arXiv:2203.14465.

    Rationalisation (another try with the answer as a hint) is a prompt of its own, and is not done.

    Args:
        reward_funcs: A verifier, above 0 for a right answer.
        **options: Of `CandidateResampler`.
    """
    defaults: dict[str, Any] = {"acceptance": Threshold(minimum=0.0), "num_candidates": 1, "round_start": "base"}
    return CandidateResampler(reward_funcs, **defaults | options)


def rft(reward_funcs: Any, num_train_epochs: int, **options: Any) -> CandidateResampler:
    """RFT: one round of right answers with distinct equations, trained on for several epochs.

    Yuan et al. 2023, arXiv:2308.01825: 100 answers of a fine-tuned model; they and the original data train the base.

    Args:
        reward_funcs: A verifier, above 0 for a right answer.
        num_train_epochs: That of the training arguments, at least 1: there is one round.
        **options: Of `CandidateResampler`: `proposal_model` for the fine-tuned model if the base is trained,
            `supervised_dataset` and `supervised_fraction` for the original data.
    """
    defaults: dict[str, Any] = {
        "acceptance": Threshold(minimum=0.0),
        "num_candidates": 100,
        "dedup": Deduplicate(solution_equations),
        "every_n_epochs": num_train_epochs,
    }
    return CandidateResampler(reward_funcs, **defaults | options)


def rso(reward_funcs: Any, beta: float = 0.5, k: int = 8, **options: Any) -> CandidateResampler:
    """RSO: k answers distributed as q(y|x) exp(r / beta). Liu et al. 2023, arXiv:2309.06657.

    The paper accepts 8 of 64 and trains on pairs of them: of the best and the worst accepted answer,
    `export_dpo(load_candidates(round_folder).filter(lambda row: row["is_accepted"]))` for TRL's DPOTrainer.

    Args:
        reward_funcs: As in `CandidateResampler`.
        beta: Temperature in units of reward, > 0.
        k: Accepted answers per prompt, at least 1.
        **options: Of `CandidateResampler`.
    """
    defaults: dict[str, Any] = {"acceptance": RSO(beta, k), "num_candidates": 64}
    return CandidateResampler(reward_funcs, **defaults | options)


def jtt(upweight: float = 5.0, warmup_epochs: int = 1, **options: Any) -> LossResampler:
    """JTT within one run: the rows that are wrong after warm-up are drawn `upweight` times as often.

    Liu et al. 2021, arXiv:2107.09044, who train anew from the start weights; here the run goes on.

    Args:
        upweight: Weight of such a row against 1 of the others, at least 1.
        warmup_epochs: Uniform epochs before the set is found, at least 0.
        **options: Of `LossResampler`.
    """
    defaults: dict[str, Any] = {"losses": "forward", "warmup_epochs": warmup_epochs}
    return LossResampler(ErrorSet(upweight), **defaults | options)


def self_training(unlabelled_dataset: Any, min_confidence: float = 0.95, **options: Any) -> PredictionResampler:
    """Pseudo-labels: the most probable class of confident rows. Lee 2013; Sohn et al. 2020, arXiv:2001.07685.

    FixMatch predicts a weakly and trains on a strongly augmented row; the augmentation is that of the data set here.

    Args:
        unlabelled_dataset: As in `PredictionResampler`.
        min_confidence: Probability of the predicted class from which a row is taken.
        **options: Of `PredictionResampler`.
    """
    # So cold that the proposal is the most probable class, and the target is the proposal: nothing else is rejected.
    cold = 1e-4
    defaults: dict[str, Any] = {"target": Sharpened(cold), "temperature": cold, "min_confidence": min_confidence}
    return PredictionResampler(unlabelled_dataset, **defaults | options)
