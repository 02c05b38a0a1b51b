"""Acceptance rules: masks worked out by hand, invariances, validation of arguments; `test_density.py` has the laws."""

import dataclasses
import math

import pytest
import torch
from scipy import stats

from rsft_hf import acceptance
from rsft_hf.acceptance import (
    RSO,
    Acceptance,
    CandidateBatch,
    DensityRatio,
    DifficultyRange,
    PerPromptCap,
    RandomLike,
    RandomPerPrompt,
    Sequence,
    Threshold,
    TopKOverall,
    TopKPerPrompt,
)

NAN = math.nan
# Five prompts, four candidates: two ties for the first place, a plain row, all equal, and a row without rewards.
REWARDS = torch.tensor(
    [
        [0.9, 0.1, 0.9, 0.5],
        [0.2, 0.2, 0.2, 0.2],
        [0.3, 0.8, 0.7, NAN],
        [-1.0, -2.0, -3.0, -0.5],
        [NAN, NAN, NAN, NAN],
    ],
    dtype=torch.float64,
)
LENGTHS = torch.tensor([[9, 3, 4, 5], [7, 2, 5, 3], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
BATCH = CandidateBatch(REWARDS, lengths=LENGTHS)

MASKS = {
    Threshold(minimum=0.2): ["x.xx", "....", "xxx.", "....", "...."],  # strictly above
    Threshold(schedule=(0.6, 0.8)): ["x.x.", "....", ".xx.", "....", "...."],  # round 0
    Threshold(schedule=(0.6, 0.8)).for_round(1): ["x.x.", "....", "....", "....", "...."],
    # 15 judged: .9 .9 .8 .7 .5 .3 .2 .2 .2 .2 .1 -.5 -1 -2 -3. A fifth is 3; half is 7.5, so 8, the second .2: all tie.
    Threshold(quantile=0.8): ["x.x.", "....", ".x..", "....", "...."],
    Threshold(quantile=0.5): ["x.xx", "xxxx", "xxx.", "....", "...."],
    Threshold(quantile=1): ["x.x.", "....", "....", "....", "...."],
    Threshold(quantile=0): ["xxxx", "xxxx", "xxx.", "xxxx", "...."],
    # A half of four is 2, of three 1.5 and so 2. Equal rewards pass together.
    Threshold(prompt_quantile=0.5): ["x.x.", "xxxx", ".xx.", "x..x", "...."],
    Threshold(prompt_quantile=1): ["x.x.", "xxxx", ".x..", "...x", "...."],
    TopKPerPrompt(1, "shortest"): ["..x.", ".x..", ".x..", "...x", "...."],
    TopKPerPrompt(2, "shortest"): ["x.x.", ".x.x", ".xx.", "x..x", "...."],
    TopKPerPrompt(9): ["xxxx", "xxxx", "xxx.", "xxxx", "...."],
    TopKOverall(1, "shortest"): ["..x.", "....", "....", "....", "...."],
    TopKOverall(4): ["x.x.", "....", ".xx.", "....", "...."],  # .9 .9 .8 .7
    TopKOverall(8, "shortest"): ["x.xx", ".x.x", "xxx.", "....", "...."],  # then .5 .3 and the two shortest of .2
    TopKOverall(99): ["xxxx", "xxxx", "xxx.", "xxxx", "...."],
    PerPromptCap(2, "best"): ["x.x.", None, ".xx.", "x..x", "...."],
    # Above .4: 3 of 4, 0 of 4, 2 of 3, 0 of 4, 0 of 0.
    DifficultyRange(0.1, 0.7, solved_above=0.4): ["....", "....", "xxx.", "....", "...."],
    DifficultyRange(0.5, 0.75, solved_above=0.4): ["xxxx", "....", "xxx.", "....", "...."],
    DifficultyRange(0.0, 0.0, solved_above=0.4): ["....", "xxxx", "....", "xxxx", "...."],
    # Above .2, which the second row never is: shares 3/4, 0, 3/3, 0.
    DifficultyRange(0.0, 0.5, solved_above=0.2): ["....", "xxxx", "....", "xxxx", "...."],
    RSO(beta=1e-300, k=1): [None, None, ".x..", "...x", "...."],
    RSO(beta=1e-300, k=2): ["x.x.", None, ".xx.", "x..x", "...."],
    RSO(beta=1.0, k=9): ["xxxx", "xxxx", "xxx.", "xxxx", "...."],
    RandomPerPrompt(9): ["xxxx", "xxxx", "xxx.", "xxxx", "...."],
    Sequence(Threshold(minimum=0.2), TopKPerPrompt(1, "shortest")): ["..x.", "....", ".x..", "....", "...."],
    # The median of what is above .2: .9 .9 .8 .7 .5 .3, of which the upper three.
    Sequence(Threshold(minimum=0.2), Threshold(quantile=0.5)): ["x.x.", "....", ".x..", "....", "...."],
}
RANDOM = (RSO(beta=0.5, k=2), RandomPerPrompt(2), PerPromptCap(2), TopKPerPrompt(1), RandomLike(Threshold(minimum=0.2)))
RULES = (*MASKS, *RANDOM, DensityRatio(), DensityRatio(beta=2.0, quantile=0.5, per_prompt=True))
# Without ties these take no random number that matters: their verdict moves with the candidate.
ORDERLESS = tuple(
    rule for rule in RULES if not isinstance(rule, (RSO, RandomPerPrompt, RandomLike)) and rule != PerPromptCap(2)
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(num_prompts: int = 40, num_candidates: int = 6, seed: int = 1) -> CandidateBatch:
    """Distinct rewards, some of them NaN, some candidates invalid, and everything a rule can read."""
    draw = lambda: torch.rand(num_prompts, num_candidates, dtype=torch.float64, generator=generator)  # noqa: E731
    generator = seeded(seed)
    return CandidateBatch(
        rewards=draw().masked_fill(draw() < 0.2, NAN),
        log_q=draw().log(),
        log_p=draw().log(),
        lengths=(draw() * 9).long(),
        valid=draw() < 0.7,
        uniforms=draw(),
    )


def test_every_rule_is_tried():
    published = {getattr(acceptance, name) for name in acceptance.__all__}
    kinds = {kind for kind in published if isinstance(kind, type) and Acceptance in kind.__mro__[1:]}
    assert {type(rule) for rule in RULES} == kinds
    assert len(kinds) == 10
    assert len(MASKS) == 27
    assert len(ORDERLESS) == 26


@pytest.mark.parametrize(("rule", "rows"), MASKS.items(), ids=map(repr, MASKS))
@pytest.mark.parametrize("seed", range(3))
def test_masks_worked_out_by_hand(rule, rows, seed):
    accepted = rule(BATCH, seeded(seed))
    assert accepted.shape == (5, 4)
    assert accepted.dtype == torch.bool
    found = ["".join("x" if cell else "." for cell in row) for row in accepted.tolist()]
    assert found == [row or found[i] for i, row in enumerate(rows)]  # None: a tie, drawn at random


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_nothing_invalid_or_unjudged_is_accepted_or_felt(rule):
    batch = random_batch()
    accepted = rule(batch, seeded())
    assert bool(accepted.any())
    assert not bool((accepted & ~batch.is_candidate).any())
    assert torch.equal(rule(batch, seeded()), accepted), "the generator decides"
    # What stands in cells that are not valid changes nothing: no maximum, quantile, rank or envelope reads it.
    fill = {"rewards": 1e9, "log_p": 1e3, "log_q": NAN, "lengths": -0, "uniforms": 0.0}
    changes = {name: getattr(batch, name).masked_fill(~batch.valid, value) for name, value in fill.items()}
    assert torch.equal(rule(dataclasses.replace(batch, **changes), seeded()), accepted)


@pytest.mark.parametrize("rule", ORDERLESS, ids=repr)
def test_verdicts_move_with_the_candidates(rule):
    batch, generator = random_batch(), seeded(2)
    prompts, candidates = torch.randperm(40, generator=generator), torch.randperm(6, generator=generator)
    moved = CandidateBatch(**{name: values[prompts][:, candidates] for name, values in vars(batch).items()})
    assert torch.equal(rule(moved, seeded(3)), rule(batch, seeded(4))[prompts][:, candidates])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_batch_without_candidates_accepts_nothing(rule):
    batch = dataclasses.replace(random_batch(), valid=torch.zeros(40, 6, dtype=torch.bool))
    assert not bool(rule(batch, seeded()).any())


def test_ties_are_broken_at_random_and_never_by_index():
    zeros = torch.zeros(8_000, 4)
    for rule in (TopKPerPrompt(1), RSO(beta=0.1), RandomPerPrompt(1), PerPromptCap(1, "best"), PerPromptCap(1)):
        assert stats.chisquare(rule(CandidateBatch(zeros), seeded()).sum(0).numpy()).pvalue > 0.001, rule
    overall = TopKOverall(4_000)(CandidateBatch(zeros), seeded())
    assert int(overall.sum()) == 4_000
    assert stats.chisquare(overall.sum(0).numpy()).pvalue > 0.001
    assert stats.chisquare(overall.reshape(8, -1).sum(1).numpy()).pvalue > 0.001
    # Of equal lengths, too: columns 1 and 3 are the shortest.
    lengths = torch.tensor([[5, 2, 4, 2]]).expand(8_000, 4)
    counts = TopKPerPrompt(1, "shortest")(CandidateBatch(zeros, lengths=lengths), seeded()).sum(0).tolist()
    assert counts[0] == counts[2] == 0
    assert stats.chisquare(counts[1::2]).pvalue > 0.001


def test_a_random_control_matches_the_rule_prompt_by_prompt():
    batch, rule = random_batch(), Threshold(minimum=0.4)
    accepted, control = rule(batch, seeded()), RandomLike(rule)(batch, seeded())
    assert torch.equal(control.sum(1), accepted.sum(1))
    assert not torch.equal(control, accepted)
    assert RandomLike(Threshold(schedule=(0.0, 0.5))).for_round(1) == RandomLike(Threshold(minimum=0.5))


def test_a_sequence_passes_on_rounds_and_requirements():
    sequence = Sequence(DensityRatio(beta=1.0), Sequence(Threshold(schedule=(0.0, 0.5))), RandomLike(TopKPerPrompt(2)))
    assert sequence.requires == frozenset({"log_q", "log_p"})
    assert Sequence(RSO(beta=1.0)).requires == frozenset() == RandomLike(RSO(beta=1.0)).requires
    expected = "Sequence(DensityRatio(beta=1.0), Sequence(Threshold(minimum=0.5)), RandomLike(rule=TopKPerPrompt(k=2)))"
    assert repr(sequence.for_round(1)) == expected


def test_equal_rewards_in_every_rule_of_thresholds():
    batch = CandidateBatch(torch.ones(3, 4))
    for rule in (Threshold(quantile=0.9), Threshold(prompt_quantile=0.9)):
        assert bool(rule(batch, seeded()).all())
    assert not bool(Threshold(minimum=1.0)(batch, seeded()).any())


REFUSED = [
    (lambda: Threshold(), "exactly one of `minimum`.*got none"),
    (lambda: Threshold(minimum=0.0, quantile=0.5), "exactly one"),
    (lambda: Threshold(minimum=NAN), "must be finite"),
    (lambda: Threshold(schedule=()), "`schedule` is empty"),
    (lambda: Threshold(schedule=(0.0, math.inf)), "must be finite"),
    (lambda: Threshold(quantile=1.1), r"`quantile`=1.1 must lie in \[0, 1\]"),
    (lambda: Threshold(prompt_quantile=-0.1), "`prompt_quantile`=-0.1"),
    (lambda: TopKPerPrompt(0), "`k`=0 must be an integer of at least 1"),
    (lambda: TopKPerPrompt(1, "first"), "`tie_break`='first'"),
    (lambda: TopKOverall(2, "last"), "`tie_break`='last'"),
    (lambda: TopKPerPrompt(1, "shortest")(CandidateBatch(REWARDS), seeded()), "reads `lengths`"),
    (lambda: RSO(beta=0.0), r"`beta`=0.0 must lie in \(0, inf\]"),
    (lambda: RSO(beta=NAN), "`beta`=nan"),
    (lambda: DensityRatio(beta=-1.0), "`beta`=-1.0"),
    (lambda: DensityRatio(quantile=0.0), "`quantile`=0.0"),
    (lambda: DensityRatio(log_envelope=math.inf), "`log_envelope`=inf must be finite"),
    (lambda: DensityRatio(log_envelope=0.0, per_prompt=True), "have no effect with it"),
    (lambda: DensityRatio()(CandidateBatch(REWARDS), seeded()), r"DensityRatio\(\) reads `log_p`"),
    (lambda: PerPromptCap(1, "worst"), "`keep`='worst'"),
    (lambda: DifficultyRange(0.6, 0.5), "0 <= low <= high <= 1"),
    (lambda: DifficultyRange(0.0, 1.0, solved_above=NAN), "`solved_above` is NaN"),
    (lambda: Sequence(), "at least one rule"),
    (lambda: Sequence(DensityRatio(), TopKPerPrompt(1), DensityRatio(beta=1.0)), "more than one rule that reads"),
    (lambda: CandidateBatch(torch.zeros(3)), r"shape \(P, n\).*got \(3,\)"),
    (lambda: CandidateBatch(torch.zeros(0, 3)), r"got \(0, 3\)"),
    (lambda: CandidateBatch(torch.zeros(2, 3), log_q=torch.zeros(2, 2)), r"`log_q` has shape \(2, 2\)"),
    (lambda: CandidateBatch(torch.tensor([[0.0, math.inf]])), "`rewards` is inf at prompt 0, candidate 1"),
    (lambda: CandidateBatch(torch.zeros(1, 2), log_p=torch.tensor([[0.0, NAN]])), "`log_p` is nan at prompt 0, candi"),
    (lambda: CandidateBatch(torch.zeros(1, 1), uniforms=torch.ones(1, 1)), r"`uniforms` is 1.0 .* in \[0, 1\)"),
    (lambda: CandidateBatch(torch.zeros(1, 1), lengths=torch.tensor([[-1]])), "`lengths` is -1"),
]
WRONG_KINDS = [
    (lambda: TopKOverall(2.0), "`k`=2.0 must be an integer"),
    (lambda: RandomPerPrompt(True), "`k`=True must be an integer"),
    (lambda: Sequence(TopKPerPrompt), "a rule of Sequence.. must be a rule"),
    (lambda: RandomLike(len), "Derive its class from"),
    (lambda: CandidateBatch(torch.zeros(1, 1), valid=torch.ones(1, 1)), "`valid` must be a bool tensor"),
    (lambda: CandidateBatch(torch.zeros(1, 1), lengths=torch.ones(1, 1)), "`lengths` must be whole numbers"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_wrong_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("build", "message"), WRONG_KINDS)
def test_wrong_kinds_are_refused(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_a_schedule_stays_at_its_last_value():
    rule = Threshold(schedule=(0.1, 0.2, 0.3))
    assert [rule.for_round(number).minimum for number in (0, 1, 2, 3, 4, 9)] == [0.1, 0.2, 0.3, 0.3, 0.3, 0.3]


def test_one_of_all_is_the_best_of_all():
    assert TopKOverall(1)(CandidateBatch(torch.tensor([[1.0, 3.0], [2.0, 0.0]])), seeded()).tolist() == [
        [False, True],
        [False, False],
    ]


def test_a_cap_keeps_at_random_unless_the_best_are_wanted():
    batch = CandidateBatch(torch.arange(4.0).repeat(200, 1))
    kept = PerPromptCap(1)(batch, seeded()).double().mean(0)
    assert float(kept.min()) > 0.15  # a quarter each, of 200
    assert PerPromptCap(1, keep="best")(batch, seeded()).double().mean(0).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_a_range_of_difficulty_may_be_one_fraction_and_none_beyond_one():
    half = CandidateBatch(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    rows = DifficultyRange(0.5, 0.5)(half, seeded()).any(1)
    assert rows.tolist() == [True, False, False]
    for low, high in ((0.2, 1.5), (0.6, 0.5), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="low"):
            DifficultyRange(low, high)


@pytest.mark.parametrize(
    "rule", [RandomLike(RandomPerPrompt(2)), Sequence(Threshold(minimum=-9.0), RandomPerPrompt(1))]
)
def test_rules_inside_of_rules_draw_from_the_same_generator(rule):
    batch = random_batch()
    torch.manual_seed(1)
    first, before = rule(batch, seeded(3)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(rule(batch, seeded(3)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator stands still
    assert not torch.equal(rule(batch, seeded(4)), first)
