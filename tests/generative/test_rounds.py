"""Attempts of a round, and what becomes of prompts for which nothing was accepted."""

import copy
import functools
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.std
import transformers as hf

import generative_runs
import generators
from generative_runs import NUM_PROMPTS, SHARDS, CountingEngine, logged, resampler, round_dir, shards, stored, trained
from rsft_hf import Deduplicate, Threshold, TopKPerPrompt
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative import RejectTruncated
from rsft_hf.generative.candidates import ACCEPTED
from rsft_hf.report.rounds import browsed_candidates, summarize_round

PROMPTS = generators.prompts(NUM_PROMPTS)["prompt"]
HALF_OF_THEM = Threshold(minimum=0.2)  # what the untrained model reaches for some prompts in every attempt


def zero(completions: list, **_) -> list[float]:
    return [0.0] * len(completions)


def counts(rows: list[dict]) -> list[int]:
    """Candidates generated for each prompt."""
    return [sum(row["prompt_id"] == prompt and row["attempt"] >= 0 for row in rows) for prompt in range(NUM_PROMPTS)]


def accepted_prompts(rows: list[dict], last_attempt: int = 99) -> set[int]:
    return {row["prompt_id"] for row in rows if row["verdict"] in ACCEPTED and row["attempt"] <= last_attempt}


def test_a_round_generates_scores_and_accepts_for_every_prompt(tmp_path: Path) -> None:
    engine = CountingEngine()
    trained(tmp_path, resampler(acceptance=TopKPerPrompt(2), engine=engine))
    rows = stored(tmp_path)
    assert engine.prompts() == PROMPTS
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == [
        (prompt, candidate) for prompt in range(NUM_PROMPTS) for candidate in range(4)
    ]
    for prompt in range(NUM_PROMPTS):
        rewards = {verdict: [] for verdict in ("accepted", "rejected")}
        for row in rows[4 * prompt : 4 * prompt + 4]:
            rewards[row["verdict"]].append(row["reward"])
        assert len(rewards["accepted"]) == 2
        assert min(rewards["accepted"]) >= max(rewards["rejected"])
    assert [row["seed"] for row in rows] == [
        candidate_seed(42, 0, prompt, 0, candidate) for prompt in range(NUM_PROMPTS) for candidate in range(4)
    ]


def test_only_prompts_in_need_are_sampled_again_with_fresh_streams(tmp_path: Path) -> None:
    engine = CountingEngine()
    trained(tmp_path, resampler(acceptance=HALF_OF_THEM, max_attempts=3, on_nothing_accepted="skip", engine=engine))
    rows = stored(tmp_path)
    expected, unfilled = list(PROMPTS), set(range(NUM_PROMPTS))
    for attempt in (0, 1):
        unfilled -= accepted_prompts(rows, attempt)
        assert 0 < len(unfilled) < NUM_PROMPTS  # or this test shows nothing
        expected += [PROMPTS[prompt] for prompt in sorted(unfilled)]
    assert engine.prompts() == expected
    assert len(set(engine.seeds)) == len(engine.seeds) == len(rows)
    assert {row["attempt"] for row in rows} == {0, 1, 2}


def test_a_prompt_is_in_need_until_it_has_its_minimum(tmp_path: Path) -> None:
    """Half of 4 candidates x 2 attempts: a prompt with three accepted after the first attempt is sampled no more."""

    def easy_or_not(completions: list, wanted: list, **_) -> list[float]:
        shares = generators.share_of_wanted(completions, wanted)
        return [1.0 if letter == "a" else share for letter, share in zip(wanted, shares, strict=True)]

    options = {"max_attempts": 2, "min_accepted_per_prompt": 3, "on_nothing_accepted": "skip"}
    trained(tmp_path, resampler(easy_or_not, HALF_OF_THEM, **options))
    rows = stored(tmp_path)
    for prompt, count in enumerate(counts(rows)):
        first = [row for row in rows if row["prompt_id"] == prompt and row["attempt"] == 0]
        assert count == (4 if sum(row["reward"] > 0.2 for row in first) >= 3 else 8)
    assert set(counts(rows)) == {4, 8}


def test_attempts_end_when_no_prompt_is_in_need(tmp_path: Path) -> None:
    engine = CountingEngine()
    trained(tmp_path, resampler(max_attempts=5, engine=engine))
    assert engine.prompts() == PROMPTS


def test_raise_explains_with_counts_range_remedies_and_keeps_the_candidates(tmp_path: Path) -> None:
    made = resampler(acceptance=Threshold(minimum=0.9), filters=(RejectTruncated(),))
    with pytest.raises(RuntimeError) as raised:
        trained(tmp_path, made)
    rows, message = stored(tmp_path), str(raised.value)
    filtered = sum(row["finish_reason"] == "length" for row in rows)
    rewards = [row["reward"] for row in rows if row["verdict"] == "rejected"]
    assert len(rows) == 4 * NUM_PROMPTS
    assert (
        f"No candidate was accepted in round-000: of 36, {36 - filtered} rejected by Threshold(minimum=0.9)" in message
    )
    assert f"(rewards {min(rewards):.4g} to {max(rewards):.4g})" in message
    assert f"{filtered} filtered out ({filtered} by RejectTruncated())" in message
    for remedy in ("`num_candidates`", "`max_attempts`", "`max_new_tokens`", 'on_nothing_accepted="best"'):
        assert remedy in message
    assert str(round_dir(tmp_path)) in message


def test_raise_names_those_that_nobody_could_judge(tmp_path: Path) -> None:
    def silent(completions, **_):
        return [None] * len(completions)

    with pytest.raises(RuntimeError, match=r"of 36, 36 that no reward function could judge \(all returned None\)"):
        trained(tmp_path, resampler(silent))
    assert {row["verdict"] for row in stored(tmp_path)} == {"unjudged"}


def test_raise_is_of_the_whole_round_not_of_a_prompt(tmp_path: Path) -> None:
    ours = trained(tmp_path, resampler(acceptance=HALF_OF_THEM))
    accepted = [row for row in stored(tmp_path) if row["is_accepted"]]
    assert 0 < len({row["prompt_id"] for row in accepted}) < NUM_PROMPTS
    assert generative_runs.logged(ours, "round/accepted_rows") == [len(accepted)]


def test_skip_leaves_prompts_out_and_keeps_the_length_of_the_epoch(tmp_path: Path) -> None:
    made = resampler(acceptance=HALF_OF_THEM, on_nothing_accepted="skip")
    ours = trained(tmp_path, made)
    assert len(made.pool) == sum(row["is_accepted"] for row in stored(tmp_path))
    assert ours.state.global_step == 5  # 9 draws in batches of two
    drawn = ours._progress.indices.tolist()
    assert len(drawn) == NUM_PROMPTS
    assert set(drawn) == set(range(len(made.pool)))


def test_skip_with_nothing_at_all_raises_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No candidate was accepted in round-000: of 36, 36 rejected"):
        trained(tmp_path, resampler(zero, Threshold(minimum=0.5), on_nothing_accepted="skip"))


def test_best_takes_the_best_rejected_after_the_last_attempt_only(tmp_path: Path) -> None:
    trained(tmp_path, resampler(acceptance=HALF_OF_THEM, max_attempts=2, on_nothing_accepted="best"))
    rows = stored(tmp_path)
    assert accepted_prompts(rows) == set(range(NUM_PROMPTS))
    fallback = [row for row in rows if row["verdict"] == "fallback"]
    assert fallback
    for chosen in fallback:
        of_prompt = [row for row in rows if row["prompt_id"] == chosen["prompt_id"]]
        assert len(of_prompt) == 8  # both attempts came first
        assert [row["verdict"] for row in of_prompt].count("rejected") == 7
        assert chosen["reward"] == max(row["reward"] for row in of_prompt)
        assert chosen["rule"] == 'on_nothing_accepted="best"'


def test_reference_is_marked_in_the_store_and_trained_on(tmp_path: Path) -> None:
    made = resampler(acceptance=HALF_OF_THEM, on_nothing_accepted="reference")
    ours = trained(tmp_path, made)
    rows = stored(tmp_path)
    references = [row for row in rows if row["finish_reason"] == "reference"]
    generated = accepted_prompts([row for row in rows if row["attempt"] >= 0])
    assert {row["prompt_id"] for row in references} == set(range(NUM_PROMPTS)) - generated
    assert references
    for row in references:
        assert (row["attempt"], row["candidate"], row["verdict"], row["reward"]) == (-1, -1, "fallback", None)
        assert row["text"] == generators.prompts(NUM_PROMPTS)[row["prompt_id"]]["reference"]
    letters = [generators.A + generators.LETTERS.index(row["text"]) for row in references]
    answers = [[token for token in row["labels"] if token != -100] for row in made.pool.accepted]
    for letter in letters:
        assert [letter, generators.EOS] in answers  # the end is learnt too
    assert ours.state.global_step == 5
    summary = summarize_round(tmp_path / "candidates" / "round-000")  # of what was generated
    assert len(summary.prompt_ids) == len(rows) - len(references)
    assert browsed_candidates([tmp_path / "candidates" / "round-000"], 10**6)["total"] == len(rows) - len(references)


def test_what_earlier_rounds_accepted_must_be_there(tmp_path: Path) -> None:
    options = {"dedup": Deduplicate(across_rounds=True), "on_nothing_accepted": "best"}
    args = {"num_train_epochs": 2, "save_strategy": "epoch"}
    trained(tmp_path / "whole", resampler(**options), args=args)
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    message = r"round-000 is gone, whose accepted candidates are looked at by Deduplicate\(across_rounds=True\)"
    with pytest.raises(RuntimeError, match=message):
        trained(tmp_path / "moved", resampler(**options), args=args, resume=str(checkpoint))


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    args = {
        "num_train_epochs": 3,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "metric_for_best_model": "reward",
    }
    keywords = {"args": args, "eval_dataset": generators.prompts(3, first=82)}
    trained(tmp_path / "whole", resampler(round_start="best", on_nothing_accepted="best"), **keywords)
    (tmp_path / "whole").rename(tmp_path / "moved")
    message = r'round_start="best" goes back to .*whole.checkpoint-5, which is gone'
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "moved", resampler(round_start="best", on_nothing_accepted="best"), **keywords,
                resume=str(tmp_path / "moved" / "checkpoint-5"))  # fmt: skip


def test_a_round_of_references_alone_is_no_empty_round(tmp_path: Path) -> None:
    made = resampler(zero, Threshold(minimum=0.5), on_nothing_accepted="reference")
    trained(tmp_path, made)
    assert len(made.pool) == NUM_PROMPTS


@pytest.mark.parametrize("name", generators.NAMES)
def test_labels_are_the_sampled_tokens_and_the_prompt_is_masked(tmp_path: Path, name: str) -> None:
    made = resampler()
    trained(tmp_path, made, model=generators.tiny_model(name), processing_class=generators.tokenizer_for(name))
    accepted = [row for row in stored(tmp_path) if row["is_accepted"]]
    for row, training in zip(accepted, made.pool.accepted, strict=True):
        prompt = generators.tokenizer_for(name)(row["prompt"])["input_ids"]
        if name in generators.ENCODER_DECODER:
            assert (training["input_ids"], training["labels"]) == (prompt, row["token_ids"])
        else:
            assert training["input_ids"] == prompt + row["token_ids"]
            assert training["labels"] == [-100] * len(prompt) + row["token_ids"]


def test_duplicates_of_a_round_are_accepted_once(tmp_path: Path) -> None:
    def ones(completions, **_):
        return [1.0] * len(completions)

    trained(tmp_path, resampler(ones, Threshold(minimum=0.5), dedup=Deduplicate(key=lambda text: text[:1])))
    rows = stored(tmp_path)
    for prompt in range(NUM_PROMPTS):
        texts = [row["text"][:1] for row in rows if row["prompt_id"] == prompt]
        accepted = [row["text"][:1] for row in rows if row["prompt_id"] == prompt and row["is_accepted"]]
        assert sorted(accepted) == sorted(set(texts))
    assert sum(row["verdict"] == "duplicate" for row in rows) > 0


STEPS = 5  # of an epoch: 9 rows in batches of two


SUPERVISED = [{"prompt": "a b", "completion": "c"}, {"input_ids": [6, 7, 8, 1], "labels": [-100, -100, 8, 1]}]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([values.detach().flatten().clone() for values in model.parameters()])


class WeighingEngine(CountingEngine):
    """Notes the weights that every call generates with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __call__(self, model: Any, request: Any) -> Any:
        self.weights.append(weights(model))
        return super().__call__(model, request)


class Starts(hf.TrainerCallback):
    """Notes the weights, and whether the optimizer has a state, before the first step of every epoch and after it."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []
        self.last: list[torch.Tensor] = []
        self.has_momenta: list[bool] = []

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step % STEPS == 0:
            self.first.append(weights(model))
            self.has_momenta.append(len(optimizer.state) > 0)

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.last.append(weights(model))


def run_from(tmp_path: Path, round_start: str, **keywords: Any) -> tuple[Starts, WeighingEngine]:
    starts, engine = Starts(), WeighingEngine()
    args = {"num_train_epochs": 3, **keywords.pop("args", {})}
    made = resampler(round_start=round_start, engine=engine)
    trained(tmp_path, made, args=args, callbacks=[starts], **keywords)
    assert len(starts.first) == len(starts.last) == 3
    for number in (1, 2):
        assert not torch.equal(starts.first[number - 1], starts.last[number - 1])
    return starts, engine


def test_last_goes_on(tmp_path: Path) -> None:
    starts, engine = run_from(tmp_path, "last")
    for number in (1, 2):
        assert torch.equal(starts.first[number], starts.last[number - 1])
        assert torch.equal(engine.weights[number * SHARDS], starts.last[number - 1])
    assert starts.has_momenta == [False, True, True]


def test_base_generates_with_the_last_and_trains_from_the_first(tmp_path: Path) -> None:
    starts, engine = run_from(tmp_path, "base")
    for number in (1, 2):
        assert torch.equal(starts.first[number], starts.first[0])
        assert torch.equal(engine.weights[number * SHARDS], starts.last[number - 1])
    assert starts.has_momenta == [False] * 3


def test_base_of_lora_is_its_adapter_at_the_start(tmp_path: Path) -> None:
    starts, _ = run_from(tmp_path, "base", model=with_lora())
    assert torch.equal(starts.first[1], starts.first[0])


def test_best_goes_back_to_the_best_checkpoint_before_it_generates(tmp_path: Path) -> None:
    scores = iter([0.9, 0.1, 0.5])
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "score"}
    starts, engine = run_from(
        tmp_path,
        "best",
        args={**best, "greater_is_better": True},
        eval_dataset=generators.prompts(2, first=50),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    assert torch.equal(starts.first[1], starts.last[0])  # the best is the last
    assert torch.equal(starts.first[2], starts.last[0])
    trainings = [number for number, seen in enumerate(engine.weights) if torch.equal(seen, starts.last[0])]
    assert len(trainings) == 2 * SHARDS + 1  # both rounds, and the evaluation in between
    assert starts.has_momenta == [False, True, False]


def test_replay_trains_on_the_accepted_of_earlier_rounds_too(tmp_path: Path) -> None:
    made = resampler(replay_rounds=1)
    ours = trained(tmp_path, made, args={"num_train_epochs": 3})
    accepted = [[row["token_ids"] for row in stored(tmp_path, number) if row["is_accepted"]] for number in range(3)]
    answers = [[token for token in row["labels"] if token != -100] for row in made.pool.accepted]
    assert answers == accepted[1] + accepted[2]
    assert logged(ours, "round/accepted_rows") == [9, 18, 18]


@pytest.mark.parametrize(("fraction", "expected"), [(0.4, 4), (1.0, 10), (0.05, 0)])
def test_the_supervised_share_is_exact_in_every_epoch(tmp_path: Path, fraction: float, expected: int) -> None:
    made = resampler(supervised_dataset=SUPERVISED, supervised_fraction=fraction, num_draws=10)
    drawn, draw = [], made._draw
    made._draw = lambda epoch: drawn.append(draw(epoch)) or drawn[-1]
    trained(tmp_path, made, args={"num_train_epochs": 2})
    for rows in drawn:
        assert len(rows) == 10
        assert int((rows < 2).sum()) == expected
        assert set(rows[rows < 2].tolist()) == ({0, 1} if expected else set())
    assert len(drawn) == 2
    prompt, answer = [generators.A, generators.A + 1], [generators.A + 2, generators.EOS]
    assert made.pool[0]["input_ids"] == prompt + answer
    assert made.pool[0]["labels"] == [-100, -100, *answer]
    assert {name: made.pool[1][name] for name in ("input_ids", "labels")} == SUPERVISED[1]


def test_rounds_every_second_epoch_read_the_same_rows_in_another_order(tmp_path: Path) -> None:
    engine, orders = CountingEngine(), []

    class Orders(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % STEPS == 0:
                orders.append(ours._progress.indices.tolist())

    from generative_runs import trainer

    ours = trainer(tmp_path, resampler(every_n_epochs=2, engine=engine), args={"num_train_epochs": 4})
    ours.add_callback(Orders())
    ours.train()
    assert len(engine.calls) == 2 * SHARDS
    assert shards(tmp_path, 1)
    assert not shards(tmp_path, 2)
    assert len(orders) == 4
    assert all(sorted(order) == list(range(NUM_PROMPTS)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[3]


@pytest.mark.parametrize(("num_draws", "steps"), [(4, 2), (9, 5), (20, 10)])
def test_num_draws_is_the_length_of_the_epoch(tmp_path: Path, num_draws: int, steps: int) -> None:
    """Whole passes come first: 20 draws of 9 rows are each row twice, and two rows a third time."""
    ours = trained(tmp_path, resampler(num_draws=num_draws))
    drawn = ours._progress.indices.tolist()
    assert (len(drawn), ours.state.global_step) == (num_draws, steps)
    counts = sorted(drawn.count(row) for row in range(9))
    assert counts == sorted((num_draws + place) // 9 for place in range(9))


def test_a_proposal_model_generates_and_is_not_trained(tmp_path: Path) -> None:
    teacher, engine = generators.tiny_model(seed=5), WeighingEngine()
    before = weights(teacher)
    ours = trained(tmp_path, resampler(proposal_model=teacher, engine=engine), args={"num_train_epochs": 2})
    assert all(torch.equal(seen, before) for seen in engine.weights)
    assert torch.equal(weights(teacher), before)
    assert not torch.equal(weights(ours.model), weights(generators.tiny_model()))


def log_probability(model: Any, row: dict) -> float:
    """A slow oracle: one sequence, one softmax a token."""
    prompt = generators.tokenizer()(row["prompt"])["input_ids"]
    ids = torch.tensor([prompt + row["token_ids"]])
    with torch.no_grad():
        logs = copy.deepcopy(model).eval()(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(prompt) + step - 1, token]) for step, token in enumerate(row["token_ids"]))


def with_lora() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = peft.get_peft_model(generators.tiny_model(), config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name:
                values.normal_()  # an adapter that has learnt
    return model


def test_log_probabilities_are_kept_when_asked_for(tmp_path: Path) -> None:
    trained(tmp_path / "without")
    assert {row["log_q"] for row in stored(tmp_path / "without")} == {None}
    config = generators.sampling(temperature=0.5)
    trained(tmp_path / "with", resampler(keep_log_probs=True, generation_config=config))
    for row in stored(tmp_path / "with"):
        assert row["log_p"] == pytest.approx(log_probability(generators.tiny_model(), row), abs=1e-4)
        assert row["log_q"] != row["log_p"]  # q is what was sampled, at temperature 0.5


@pytest.mark.parametrize("reference", ["model", "base"])
def test_log_p_is_that_of_the_reference_and_log_q_of_the_policy(tmp_path: Path, reference: str) -> None:
    policy = with_lora()
    start = copy.deepcopy(policy)
    oracle = generators.tiny_model() if reference == "base" else generators.tiny_model(seed=8)
    made = resampler(reference_model=oracle if reference == "model" else "base")
    trained(tmp_path, made, model=policy)
    rows = stored(tmp_path)
    for row in rows:
        assert row["log_p"] == pytest.approx(log_probability(oracle, row), abs=1e-4)
        assert row["log_q"] == pytest.approx(log_probability(start, row), abs=1e-4)
    assert max(abs(row["log_p"] - row["log_q"]) for row in rows) > 0.1


@pytest.mark.parametrize("across_rounds", [False, True])
def test_deduplication_across_rounds_accepts_an_answer_once(tmp_path: Path, across_rounds: bool) -> None:
    made = resampler(acceptance=TopKPerPrompt(4), dedup=Deduplicate(across_rounds=across_rounds))
    trained(tmp_path, made, args={"num_train_epochs": 2, "learning_rate": 1e-6})
    accepted = [
        {(row["prompt_id"], row["text"]) for row in stored(tmp_path, number) if row["is_accepted"]} for number in (0, 1)
    ]
    generated = {(row["prompt_id"], row["text"]) for row in stored(tmp_path, 1)}
    assert accepted[0] & generated  # an answer of both rounds, or this test shows nothing
    assert accepted[1] == (generated - accepted[0] if across_rounds else generated)


def test_a_schedule_raises_the_threshold_round_by_round(tmp_path: Path) -> None:
    trained(tmp_path, resampler(acceptance=Threshold(schedule=(0.0, 0.2))), args={"num_train_epochs": 3})
    for number, minimum in enumerate((0.0, 0.2, 0.2)):
        rows = stored(tmp_path, number)
        assert [row["is_accepted"] for row in rows] == [row["reward"] > minimum for row in rows]
        assert {row["rule"] for row in rows} == {f"Threshold(minimum={minimum})"}


def test_the_chat_template_is_told_what_the_user_says(tmp_path: Path) -> None:
    engine = CountingEngine()
    made = resampler(chat_template_kwargs={"enable_thinking": True}, engine=engine)
    trained(tmp_path, made, train_dataset=generators.prompts(NUM_PROMPTS, conversational=True))
    assert all(prompt.endswith("<|im_start|> assistant think") for prompt in engine.prompts())
    assert stored(tmp_path)[0]["prompt"] == [{"role": "user", "content": "a a"}]


def test_a_pool_that_replay_leaves_empty_is_explained(tmp_path: Path) -> None:
    made = resampler(acceptance=Threshold(schedule=(0.0, 9.0)), on_nothing_accepted="skip", replay_rounds=1)
    with pytest.raises(RuntimeError, match="No candidate was accepted in round-002"):
        trained(tmp_path, made, args={"num_train_epochs": 3})


def test_a_round_shows_its_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for name, stream, args in (
        ("terminal", Terminal(), {"disable_tqdm": False}),
        ("file", io.StringIO(), {"disable_tqdm": False}),
        ("off", Terminal(), {}),
    ):
        monkeypatch.setattr(
            "rsft_hf.generative.rounds.tqdm", functools.partial(tqdm.std.tqdm, mininterval=0, file=stream)
        )
        trained(tmp_path / name, resampler(), args=args)
        shown[name] = stream.getvalue()
    assert "Round 0" in shown["terminal"]
    assert re.search(r"\d candidates/s, \d+ tokens/s, \d+ of \d+ accepted", shown["terminal"])
    assert f"{NUM_PROMPTS}/{NUM_PROMPTS}" in shown["terminal"]
    assert "Round 0" not in shown["file"]
    assert "Round 0" not in shown["off"]
