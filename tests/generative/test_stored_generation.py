"""Generation into a folder, the stages after it, their resume and their share of several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import generators
import rsft_hf
from generative_runs import CountingEngine, Killed
from rsft_hf import TopKPerPrompt
from rsft_hf.generative import (
    CandidateResampler,
    accept_again,
    drop_long_prompts,
    generate_candidates,
    import_candidates,
    score_again,
    stored_prompts,
)

SAMPLING = {"num_candidates": 3, "generation_config": generators.sampling()}


def generated(directory: Path, num_prompts: int = 9, **options) -> Path:
    model, tokenizer = generators.tiny_model(), generators.tokenizer()
    options = {**SAMPLING, **options}
    return generate_candidates(model, tokenizer, generators.prompts(num_prompts), directory, **options)


def texts(folder: Path) -> list[str]:
    return rsft_hf.load_candidates(folder)["text"][:]


def test_candidates_are_those_of_the_resampler(tmp_path: Path) -> None:
    folder = generated(tmp_path / "generated", seed=5)
    resampler = CandidateResampler(generators.share_of_wanted, **SAMPLING)
    made = resampler.generate(generators.tiny_model(), generators.tokenizer(), generators.prompts(9), seed=5)
    assert texts(folder) == [one.text for one in made]
    assert rsft_hf.load_candidates(folder)["token_ids"][:] == [one.token_ids for one in made]
    assert texts(generated(tmp_path / "other", seed=6)) != texts(folder)
    assert stored_prompts(folder)[:] == generators.prompts(9)[:]


def test_the_chat_template_gets_its_arguments(tmp_path: Path) -> None:
    prompts = generators.prompts(3, True)
    options = {**SAMPLING, "chat_template_kwargs": {"enable_thinking": True}}
    made = CandidateResampler(generators.share_of_wanted, **options).generate(
        generators.tiny_model(), generators.tokenizer(), prompts
    )
    folder = generate_candidates(generators.tiny_model(), generators.tokenizer(), prompts, tmp_path / "a", **options)
    assert texts(folder) == [one.text for one in made]
    assert texts(generate_candidates(generators.tiny_model(), generators.tokenizer(), prompts, tmp_path / "b",
                                     **SAMPLING)) != texts(folder)  # fmt: skip
    with pytest.raises(FileExistsError, match="other arguments"):
        generate_candidates(generators.tiny_model(), generators.tokenizer(), prompts, tmp_path / "a", **SAMPLING)


@pytest.mark.parametrize("is_conversational", [False, True])
def test_the_stages_after_it_are_those_of_the_resampler(tmp_path: Path, is_conversational: bool) -> None:
    prompts = generators.prompts(9, is_conversational)
    folder = generate_candidates(
        generators.tiny_model(), generators.tokenizer(), prompts.to_list(), tmp_path / "generated", **SAMPLING
    )
    scored = score_again(folder, tmp_path / "scored", generators.share_of_wanted)
    accepted = rsft_hf.load_candidates(accept_again(scored, tmp_path / "accepted", TopKPerPrompt(1)))
    resampler = CandidateResampler(generators.share_of_wanted, TopKPerPrompt(1), **SAMPLING)
    made = resampler.generate(generators.tiny_model(), generators.tokenizer(), prompts)
    made = resampler.accept(resampler.score(made))
    assert accepted["reward"][:] == [one.reward for one in made]
    assert accepted["is_accepted"][:] == [one.is_accepted for one in made]


def test_a_killed_call_goes_on_with_the_prompts_that_are_left(tmp_path: Path) -> None:
    whole = generated(tmp_path / "whole", engine=CountingEngine())
    with pytest.raises(Killed):
        generated(tmp_path / "killed", engine=CountingEngine(kill_before=2))
    assert len(texts(tmp_path / "killed")) == 2 * 2 * 3
    engine = CountingEngine()
    assert texts(generated(tmp_path / "killed", engine=engine)) == texts(whole)
    assert len(engine.calls) == 3
    again = CountingEngine()
    generated(tmp_path / "killed", engine=again)
    assert again.calls == []


def test_a_judge_that_was_out_is_asked_again(tmp_path: Path) -> None:
    folder, is_out = generated(tmp_path / "generated"), [True]

    def judge(completions: list, log_metric, **columns) -> list[float | None]:
        log_metric("judge/failures", len(completions) * is_out[0])
        return [None if is_out[0] else 1.0 for _ in completions]

    for is_out[0], expected in ((True, {None}), (False, {1.0})):
        score_again(folder, tmp_path / "scored", [judge, generators.share_of_wanted], filters=())
        assert set(rsft_hf.load_candidates(tmp_path / "scored")["rewards/judge"]) == expected


def test_scores_of_other_prompts_or_candidates_are_never_taken(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2 =", "completion": text} for text in ("4", "5")]
    is_right = lambda completions, answer, **_: [float(pair[0] == pair[1]) for pair in zip(completions, answer)]  # noqa: E731
    source = import_candidates(rows, tmp_path / "in")
    score_again(source, tmp_path / "scored", is_right, [{"prompt": "2 + 2 =", "answer": "5"}])
    with pytest.raises(FileExistsError, match="is not empty: it holds other candidates, prompts or functions"):
        score_again(source, tmp_path / "scored", is_right, [{"prompt": "2 + 2 =", "answer": "4"}])
    shutil.rmtree(source)
    import_candidates([{**row, "completion": "6"} for row in rows], source)
    with pytest.raises(FileExistsError, match="is not empty: it holds other candidates, prompts or functions"):
        score_again(source, tmp_path / "scored", is_right, [{"prompt": "2 + 2 =", "answer": "5"}])


def test_scoring_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    folder, calls = generated(tmp_path / "generated"), list[int]()

    def reward(completions: list, wanted: list[str], **columns) -> list[float]:
        calls.append(len(completions))
        if len(calls) in fatal:
            raise Killed
        return generators.share_of_wanted(completions=completions, wanted=wanted)

    fatal = [3]
    with pytest.raises(RuntimeError, match="raised Killed"):
        score_again(folder, tmp_path / "scored", reward, filters=())
    before = len(calls)
    score_again(folder, tmp_path / "scored", reward, filters=())
    assert len(calls) - before == 3
    whole = score_again(folder, tmp_path / "whole", generators.share_of_wanted, filters=())
    names = ["reward", "text"]
    scored = rsft_hf.load_candidates(tmp_path / "scored").select_columns(names)
    assert scored[:] == rsft_hf.load_candidates(whole).select_columns(names)[:]


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"seed": 1}, "seed"),
        ({"num_candidates": 2}, "num_candidates"),
        ({"generation_config": generators.sampling(4)}, "generation_config"),
        ({"num_prompts": 8}, "prompts, encoding"),
    ],
)
def test_candidates_of_other_arguments_are_never_mixed(tmp_path: Path, options: dict, changed: str) -> None:
    before = texts(generated(tmp_path / "generated"))
    with pytest.raises(FileExistsError, match=rf"candidates of other arguments \({changed}\). Give a new folder"):
        generated(tmp_path / "generated", **options)
    assert texts(tmp_path / "generated") == before


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty, and holds no generated candidates"):
        generated(tmp_path / "mine")
    folder = generated(tmp_path / "generated")
    score_again(folder, tmp_path / "scored", generators.share_of_wanted)
    with pytest.raises(FileExistsError, match="is not empty"):
        score_again(folder, tmp_path / "scored", lambda completions, **columns: [0.0] * len(completions))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"question": "a"}], "`prompts` has no column 'prompt'; it has \\['question'\\]"),
        ([{"prompt": "a " * 200}], "The prompt in row 0 has 200 tokens"),
        ([{"prompt": ""}], "The prompt in row 0 cannot be encoded"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_written(tmp_path: Path, prompts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_candidates(
            generators.tiny_model(), generators.tokenizer(), prompts, tmp_path / "generated", **SAMPLING
        )
    assert not (tmp_path / "generated").exists()


def test_long_prompts_are_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    prompts = datasets.Dataset.from_dict({"prompt": ["a b", "a " * 7, "c", "b " * 9], "row": [0, 1, 2, 3]})
    kept = drop_long_prompts(prompts, generators.tokenizer(), 6)
    assert kept["row"][:] == [0, 2]
    assert "2 of 4 prompts have more than 6 tokens and are dropped: rows 1, 3." in caplog.text
    assert drop_long_prompts(prompts, generators.tokenizer(), 7)["row"][:] == [0, 1, 2]
    messages = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "a b"}]]})
    length = len(
        generators.tokenizer().apply_chat_template(messages[0]["prompt"], add_generation_prompt=True)["input_ids"]
    )
    assert len(drop_long_prompts(messages, generators.tokenizer(), length)) == 1
    with pytest.raises(ValueError, match=f"Each of the 1 prompts has more than {length - 1} tokens"):
        drop_long_prompts(messages, generators.tokenizer(), length - 1)
    with pytest.raises(ValueError, match="`max_prompt_length`=0 must be an integer"):
        drop_long_prompts(messages, generators.tokenizer(), 0)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from generative.test_stored_generation import generated
import generators
from generative_runs import CountingEngine
from process_groups import write_and_leave
from rsft_hf.generative import score_again
output, engine = Path(sys.argv[1]), CountingEngine()
folder = generated(output / "generated", engine=engine)
score_again(folder, output / "scored", generators.share_of_wanted)
write_and_leave(output, len(engine.calls))
"""


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, tmp_path / "script.py", tmp_path, tests, tests / "helpers"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)) == [2, 3]
    alone = score_again(generated(tmp_path / "alone"), tmp_path / "alone_scored", generators.share_of_wanted)
    for name in ("text", "reward"):
        assert rsft_hf.load_candidates(tmp_path / "scored")[name][:] == rsft_hf.load_candidates(alone)[name][:]
