"""Completions from elsewhere: every form that they come in, scored, accepted, exported and trained on."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

import generators
from rsft_hf import Threshold, TopKPerPrompt, export_dpo, export_kto, export_sft, import_candidates, load_candidates
from rsft_hf.generative import Candidate, accept_again, score_again, stored_prompts

QUESTION = [{"role": "user", "content": "2 + 2"}]
OTHER = [{"role": "user", "content": "3 + 3"}]


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def request(number: int, messages: list[dict]) -> dict[str, Any]:
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}}


def response(number: int, *choices: tuple[str, str], error: Any = None) -> dict[str, Any]:
    body = {"choices": [{"index": place, "message": turn(text), "finish_reason": reason, "logprobs": {"content": [
        {"token": "4", "logprob": -0.5}, {"token": "", "logprob": -0.25}]}}
        for place, (text, reason) in enumerate(choices)]}  # fmt: skip
    return {
        "custom_id": f"r{number}",
        "response": None if error else {"status_code": 200, "body": body},
        "error": error,
    }


def vllm(prompt: str, *texts: str) -> SimpleNamespace:
    outputs = [SimpleNamespace(text=text, token_ids=(5, 6), finish_reason="length", cumulative_logprob=-1.5)
               for text in texts]  # fmt: skip
    return SimpleNamespace(prompt=prompt, outputs=outputs, request_id="0", prompt_token_ids=[1])


# Name -> rows, further arguments, and (prompt, text) of each candidate in order.
FORMS: dict[str, tuple[Any, dict[str, Any], list[tuple[Any, str]]]] = {
    "one per row": ([{"prompt": "2 + 2", "completion": "4", "answer": "4"}, {"prompt": "3 + 3", "completion": "5"},
                     {"prompt": "2 + 2", "completion": "5", "answer": "4"}], {},
                    [("2 + 2", "4"), ("3 + 3", "5"), ("2 + 2", "5")]),
    "lists": ([{"question": "2 + 2", "responses": ["4", "5"], "answer": "4"}], {}, [("2 + 2", "4"), ("2 + 2", "5")]),
    "named": ([{"query": "2 + 2", "completion": "no", "guess": ["4"]}], {"completions": "guess"}, [("2 + 2", "4")]),
    "messages as completions": ([{"prompt": QUESTION, "completions": [[turn("4")], [turn("5")]]}], {},
                                [(QUESTION, "4"), (QUESTION, "5")]),
    "conversations": ([{"messages": [*QUESTION, turn("4")]}, {"messages": [*OTHER, turn("6")]}], {},
                      [(QUESTION, "4"), (OTHER, "6")]),
    "open-instruct": ([{"messages": [*QUESTION, turn("5")], "model_completion": "5", "reference_completion": "4",
                        "model": "m"}], {}, [(QUESTION, "5")]),
    "ms-swift": ([{"id": "x", "messages": [*QUESTION, turn("4")], "choices": ["5", "4"]}], {},
                 [(QUESTION, "5"), (QUESTION, "4")]),
    "LMFlow": ([{"input": "2 + 2", "output": [{"score": 1.0, "text": "4"}, {"score": -0.5, "text": "5"}]}], {},
               [("2 + 2", "4"), ("2 + 2", "5")]),
    "vLLM": ([vllm("2 + 2", "4", "5")], {}, [("2 + 2", "4"), ("2 + 2", "5")]),
    "OpenAI batch": ([response(1, ("6", "stop")), response(0, ("4", "stop"), ("5", "length"))],
                     {"requests": [request(0, QUESTION), request(1, OTHER)]},
                     [(OTHER, "6"), (QUESTION, "4"), (QUESTION, "5")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_prompts_and_texts(tmp_path: Path, name: str) -> None:
    rows, arguments, expected = FORMS[name]
    found = load_candidates(import_candidates(rows, tmp_path / "round", **arguments)).to_list()
    assert [(row["prompt"], row["text"]) for row in found] == expected
    firsts = list(dict.fromkeys(json.dumps(prompt) for prompt, _ in expected))
    assert [row["prompt_id"] for row in found] == [firsts.index(json.dumps(prompt)) for prompt, _ in expected]
    prompts = stored_prompts(tmp_path / "round")
    assert [json.dumps(row["prompt"]) for row in prompts] == firsts


def test_what_vllm_and_openai_know_of_a_completion_is_kept(tmp_path: Path) -> None:
    row = load_candidates(import_candidates(FORMS["vLLM"][0], tmp_path / "vllm"))[0]
    assert (row["token_ids"], row["finish_reason"], row["log_q"]) == ([5, 6], "length", -1.5)
    rows, arguments, _ = FORMS["OpenAI batch"]
    found = load_candidates(import_candidates(rows, tmp_path / "openai", **arguments)).to_list()
    assert [(row["finish_reason"], row["log_q"]) for row in found] == [("stop", -0.75)] * 2 + [("length", -0.75)]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "completion": "x", "score": 1}, {"prompt": "a", "completion": "y", "score": 0.5}],
        [{"prompt": "a", "completions": ["x", "y"], "scores": [1, 0.5]}],
        [{"prompt": "a", "completions": [{"text": "x", "reward": 1.0}, {"text": "y", "reward": 0.5}]}],
        [{"prompt": "a", "completions": ["x", "y"], "reward": [1, 0.5]}],
        [{"prompt": "a", "completions": ["x"], "score": 1}, {"prompt": "a", "completions": ["y"], "score": [0.5]}],
    ],
)
def test_scores_of_the_data_can_be_judged_at_once(tmp_path: Path, rows: list) -> None:
    scored = import_candidates(rows, tmp_path / "scored")
    accepted = accept_again(scored, tmp_path / "accepted", Threshold(minimum=0.75))
    assert export_sft(accepted)[:] == {"prompt": ["a"], "completion": ["x"]}
    assert "score" not in stored_prompts(accepted).column_names
    assert load_candidates(accepted)["rewards/score"][:] == [1, 0.5]


@pytest.mark.parametrize("column", ["completion", "completions"])
@pytest.mark.parametrize("is_list", [False, True])
def test_what_stands_beside_a_completion_belongs_to_it(tmp_path: Path, column: str, is_list: bool) -> None:
    facts = {"finish_reason": "length", "cumulative_logprob": -2.5, "token_ids": [5, 6], "score": 0.5}
    given = {"text": "x", **facts}
    rows = [{"prompt": "a", column: [given] if is_list else given}]
    if not is_list:
        rows += [{"prompt": "b", column: "x", **facts}, {"prompt": "c", column: [turn("x")], **facts}]
    for row in load_candidates(import_candidates(rows, tmp_path / "round", completions=column)):
        assert (row["text"], row["finish_reason"], row["log_q"], row["reward"]) == ("x", "length", -2.5, 0.5)
        assert row["token_ids"] == [5, 6]


def test_lists_beside_completions_belong_to_each(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": ["x", "y"], "finish_reasons": ["stop", "length"], "token_ids": [[5], [6]]}]
    found = load_candidates(import_candidates(rows, tmp_path / "round"))
    assert (found["finish_reason"][:], found["token_ids"][:]) == (["stop", "length"], [[5], [6]])
    assert stored_prompts(tmp_path / "round").column_names == ["prompt"]


def test_scores_are_the_first_of_several_and_other_values_stay_columns(tmp_path: Path) -> None:
    several = {"prompt": "a", "completions": ["x"], "scores": [0.5], "rewards": [0.1]}
    others = [{"rewards": {"length": 1.0}}, {"scores": "good"}, {"rewards": [0.5, 1.0]}]
    found = load_candidates(import_candidates([several, {**several, "prompt": "b"}], tmp_path / "several"))
    assert found["reward"][:] == [0.5, 0.5]
    for number, other in enumerate(others):
        folder = import_candidates([{"prompt": "a", "completion": "x", **other}], tmp_path / f"other{number}")
        assert load_candidates(folder)["reward"][:] == [None]
        assert set(other) <= set(stored_prompts(folder).column_names)
    nulls = [{"prompt": "a", "completions": ["x"], "score": None, "reward": [2.0]}]
    assert load_candidates(import_candidates(nulls, tmp_path / "nulls"))["reward"][:] == [2.0]
    with pytest.raises(ValueError, match="could not convert string to float"):
        import_candidates([{"prompt": "a", "completion": "x", "score": "N/A"}], tmp_path / "bad")
    with pytest.raises(ValueError, match="it has 1 completions and 2 score"):
        import_candidates([{"prompt": "a", "completion": "x", "score": [1, 2]}], tmp_path / "odd", score="score")


@pytest.mark.parametrize("found", [[turn("mine")], {"text": "mine"}, "mine"])
def test_the_answer_is_that_of_its_column_whatever_stands_beside_it(tmp_path: Path, found) -> None:
    rows = [{"prompt": "a", "completion": found, "response": "gold", "output": "gold"}]
    folder = import_candidates(rows, tmp_path / "round", completions="completion")
    assert load_candidates(folder)["text"][:] == ["mine"]
    assert stored_prompts(folder)[0] == {"prompt": "a", "response": "gold", "output": "gold"}


def test_a_prompt_may_end_with_the_beginning_of_the_answer(tmp_path: Path) -> None:
    begun = [asked("a"), turn("Sure, ")]
    imported = load_candidates(import_candidates([{"prompt": begun, "completion": "4"}], tmp_path / "begun"))
    assert imported[0]["prompt"] == begun
    rows = [{"messages": begun, "completions": ["4"]}]  # of a whole conversation it is the answer of the data
    assert load_candidates(import_candidates(rows, tmp_path / "whole"))[0]["prompt"] == begun[:1]


def test_a_score_that_is_nan_is_none(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": ["x", "y", "z"], "scores": [float("nan"), 1.0, 0.0]}]
    folder = accept_again(import_candidates(rows, tmp_path / "in"), tmp_path / "out", Threshold(minimum=0.5))
    assert load_candidates(folder)["verdict"][:] == ["unjudged", "accepted", "rejected"]
    assert export_kto(folder)["completion"][:] == ["y", "z"]
    assert export_dpo(folder)["rejected"][:] == ["z"]


def test_tools_of_some_prompts_are_exported(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": [asked("a")], "completion": "x", "score": 1.0},
            {"prompt": [asked("b")], "completion": "y", "score": 1.0, "tools": tools}]  # fmt: skip
    for number, given in enumerate((rows, rows[::-1])):
        folder = import_candidates(given, tmp_path / f"in{number}")
        found = export_sft(accept_again(folder, tmp_path / f"out{number}", Threshold(minimum=0.5)))
        told = {row["prompt"][0]["content"]: row["tools"] for row in found}
        assert (told["a"], json.loads(told["b"])) == (None, tools)


def test_candidates_are_scored_with_the_row_of_their_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By number where the prompt there is theirs, else by the prompt: rows were dropped, or came in another order."""
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(4)]
    folder = import_candidates(rows[::-1], tmp_path / "in")
    prompts = [{"prompt": row["prompt"], "wanted": row["completion"]} for row in rows]

    def is_right(completions, prompts, wanted, **columns):
        assert prompts == [text.replace("answer", "question") for text in completions]
        return [float(text == one) for text, one in zip(completions, wanted, strict=True)]

    scored = score_again(folder, tmp_path / "scored", is_right, prompts)
    assert load_candidates(scored)["reward"][:] == [1.0] * 4
    assert load_candidates(scored)["prompt"][:] == [row["prompt"] for row in rows[::-1]]
    assert caplog.text.count("matched by prompt") == 1
    for other, number in ((prompts[1:], 0), ([*prompts, prompts[0]], 2)):
        with pytest.raises(ValueError, match=rf"^{number} rows of `prompts` have the prompt 'question 0'"):
            score_again(folder, tmp_path / f"other{number}", is_right, other)


def test_a_column_of_some_rows_is_given_as_none(tmp_path: Path) -> None:
    seen = []

    def reward(completions, hint, **columns):
        seen.extend(hint)
        return [1.0] * len(completions)

    folder = import_candidates(
        [{"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "y"}], tmp_path / "in"
    )
    score_again(folder, tmp_path / "out", reward, [{"prompt": "a", "hint": None}, {"prompt": "b", "hint": "B"}])
    assert seen == [None, "B"]


def test_a_refusal_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = [
        ({"role": "assistant", "content": None, "refusal": "I cannot."}, "stop"),
        ({"role": "assistant", "content": None}, "content_filter"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "tool_calls"),
        (turn("4"), "stop"),
    ]
    rows = [response(0, ("", ""))]
    choices = [{"index": place, "message": one, "finish_reason": why} for place, (one, why) in enumerate(answers)]
    rows[0]["response"]["body"]["choices"] = choices
    folder = import_candidates(rows, tmp_path / "in", requests=[request(0, QUESTION), request(0, QUESTION)])
    assert load_candidates(folder)["text"][:] == ["4"]
    for reason in ("no text", "content_filter", "tool_calls"):
        assert f"1 completions ended by {reason!r} were left out." in caplog.text


def test_an_answer_in_parts_is_read_and_one_of_an_unknown_name_refused(tmp_path: Path) -> None:
    row = response(0, ("", ""))
    parts = {"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}
    row["response"]["body"]["choices"] = [{"index": 0, "message": parts, "finish_reason": "stop"}]
    folder = import_candidates([row], tmp_path / "in", requests=[request(0, QUESTION)])
    assert load_candidates(folder)["text"][:] == ["42"]
    rows = [{"prompt": "a", "completions": [{"text": None, "finish_reason": "content_filter"}, {"text": "b"}]}]
    assert load_candidates(import_candidates(rows, tmp_path / "filtered"))["text"][:] == ["b"]
    with pytest.raises(ValueError, match="A completion has none of"):
        import_candidates([{"prompt": "a", "completions": [{"words": "b", "finish_reason": "length"}]}], tmp_path / "b")


def test_files_of_spreadsheets_and_long_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"\ufeffprompt,completion,score\na,{'x ' * 100_000},\nb,y,0.5\n", encoding="utf-8")
    folder = import_candidates(tmp_path / "a.csv", tmp_path / "csv")
    assert load_candidates(folder)["reward"][:] == [None, 0.5]
    (tmp_path / "a.json").write_text('\ufeff[{"prompt": "a", "completion": "x"}]', encoding="utf-8")
    assert load_candidates(import_candidates(tmp_path / "a.json", tmp_path / "json"))["text"][:] == ["x"]
    (tmp_path / "latin.csv").write_bytes("prompt,completion\na,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv cannot be read: .*Save it as .csv, in UTF-8"):
        import_candidates(tmp_path / "latin.csv", tmp_path / "latin")
    (tmp_path / "b.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"neither a list of rows, each an object, nor `instances`"):
        import_candidates(tmp_path / "b.json", tmp_path / "b")


def test_answers_that_are_cut_off_are_left_out_by_scoring_and_warned_of_without(tmp_path: Path, caplog) -> None:
    rows = [{"prompt": "a", "completion": text, "finish_reason": why, "score": 1.0}
            for text, why in (("once there was", "length"), ("the end", "stop"))]  # fmt: skip
    folder = import_candidates(rows, tmp_path / "in")
    scored = score_again(folder, tmp_path / "scored", lambda completions, **_: [1.0] * len(completions))
    assert load_candidates(scored)["verdict"][:] == ["filtered", None]
    accept_again(scored, tmp_path / "accepted", Threshold(minimum=0.5))
    assert "cut off" not in caplog.text
    accept_again(folder, tmp_path / "at once", Threshold(minimum=0.5))
    assert "1 of 2 accepted candidates are cut off" in caplog.text
    plain = import_candidates([{"prompt": "a", "completion": "b"}], tmp_path / "plain")
    with pytest.raises(ValueError, match=r"are not scored. Score them first"):
        accept_again(plain, tmp_path / "nothing", Threshold(minimum=0.5))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "2 + 2 =", "completion": text, "answer": "4"} for text in ("4", "five", "4, I think")]
    path = tmp_path / f"samples.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps({"type": "text2text", "instances": rows}))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    imported = import_candidates(path, tmp_path / "round")

    def is_right(completions, answer, **kwargs):
        return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]

    scored = score_again(imported, tmp_path / "scored", is_right)
    accepted = accept_again(scored, tmp_path / "accepted", Threshold(minimum=0.5))
    assert export_sft(accepted)["completion"][:] == ["4", "4, I think"]
    assert export_kto(accepted)["label"][:] == [True, False, True]
    assert export_dpo(accepted)[0] == {
        "prompt": "2 + 2 =", "chosen": "4", "rejected": "five", "chosen_reward": 1, "rejected_reward": 0
    }  # fmt: skip
    manifest = json.loads((accepted / "manifest.json").read_text())
    assert manifest["imported_from"] == str(path)
    assert (manifest["prompts"], manifest["candidates"]) == (1, 3)


def test_exports_take_a_data_set_and_a_list(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": ["x", "y"], "scores": [1, 0]}]
    scored = import_candidates(rows, tmp_path / "scored")
    folder = accept_again(scored, tmp_path / "accepted", TopKPerPrompt(1))
    expected = [export(folder)[:] for export in (export_sft, export_dpo, export_kto)]
    table = load_candidates(folder)
    assert [export(table)[:] for export in (export_sft, export_dpo, export_kto)] == expected
    assert export_sft(table.filter(lambda row: row["reward"] == 1))[:] == expected[0]
    accepted = {"is_accepted": True, "verdict": "accepted", "reward": 1.0}
    candidates = [Candidate(0, "a", [1], "x", "stop", **accepted),
                  Candidate(0, "a", [1], "y", "stop", verdict="rejected", is_accepted=False, reward=0.0)]  # fmt: skip
    assert [export(candidates)[:] for export in (export_sft, export_dpo, export_kto)] == expected
    with pytest.raises(ValueError, match=r"list holds no candidates that were accepted"):
        export_sft(candidates[1:])
    with pytest.raises(ValueError, match=r"lacks the columns \['prompt_id'"):
        export_sft(datasets.Dataset.from_dict({"text": ["x"]}))


def test_load_candidates_takes_the_output_folder(tmp_path: Path) -> None:
    import_candidates([{"prompt": "a", "completion": "x"}], tmp_path / "candidates" / "round-000")
    assert len(load_candidates(tmp_path)) == len(load_candidates(tmp_path / "candidates")) == 1


def test_tokens_come_from_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = generators.tokenizer()
    rows = [{"prompt": "a b", "completions": [{"text": "c a"}, {"text": "c a", "finish_reason": "length"}]}]
    whole, cut = load_candidates(import_candidates(rows, tmp_path / "round", tokenizer=tokenizer))["token_ids"][:]
    assert whole == [*cut, tokenizer.eos_token_id]
    assert cut == tokenizer("c a", add_special_tokens=False)["input_ids"]


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "a", "completions": [{"text": "x", "finish_reason": "content_filter"}, {"text": "y"}, {"text": "z"}]}
    ]
    found = load_candidates(import_candidates(rows, tmp_path / "round", max_candidates=1))
    assert found["text"][:] == ["y"]
    messages = [record.getMessage() for record in caplog.records]
    assert any("1 completions ended by 'content_filter' were left out" in message for message in messages)
    assert any("1 completions beyond `max_candidates` were left out" in message for message in messages)
    answers = [response(0, ("4", "stop")), response(1, error={"message": "overloaded"})]
    import_candidates(answers, tmp_path / "batch", requests=[request(0, QUESTION), request(1, OTHER)])
    assert any("1 requests of the batch failed" in record.getMessage() for record in caplog.records)


def test_columns_of_later_rows_are_kept_and_differences_are_warned_of(tmp_path: Path, caplog) -> None:
    rows = [{"prompt": "a", "completion": "x", "id": 1}, {"prompt": "a", "completion": "y", "id": 2},
            {"prompt": "b", "completion": "z", "answer": "4"}]  # fmt: skip
    prompts = stored_prompts(import_candidates(rows, tmp_path / "round"))
    assert prompts.to_list() == [{"prompt": "a", "id": 1, "answer": None}, {"prompt": "b", "id": None, "answer": "4"}]
    assert "The columns ['id'] differ between rows of one prompt" in caplog.records[-1].getMessage()


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffprompt,completion\r\na,x\r\n", encoding="utf-8")
    assert load_candidates(import_candidates(tmp_path / "a.csv", tmp_path / "round"))["text"][:] == ["x"]


GOOD = {"prompt": "a", "completion": "x"}


@pytest.mark.parametrize(
    ("rows", "arguments", "error", "message"),
    [
        ([], {}, ValueError, r"no row to import"),
        ([{"text": "a"}], {}, ValueError, r"No column of \['text'\] holds the prompts. Name it by `prompt`"),
        ([{"prompt": "a"}], {}, ValueError, r"No column of \['prompt'\] holds the completions"),
        (
            [{"question": "a", "input": "b", "output": "c"}],
            {},
            ValueError,
            r"\['question', 'input'\] could each hold the",
        ),
        (
            [{"prompt": "a", "response": "b", "output": "c"}],
            {},
            ValueError,
            r"\['response', 'output'\] could each hold",
        ),
        ([GOOD], {"prompt": "q"}, ValueError, r"`prompt`='q' is no column of the data, which have \['prompt'"),
        ([GOOD], {"max_candidates": 0}, ValueError, r"`max_candidates`=0 must be an integer of at least 1"),
        ([GOOD, {"prompt": "b"}], {}, ValueError, r"Row 1 cannot be imported: it has no column 'completion'"),
        (
            [GOOD, {"prompt": "b", "completion": None}],
            {},
            ValueError,
            r"Row 1 cannot be imported: A completion is None. Give text",
        ),
        (
            [GOOD, {"prompt": "b", "completion": 4}],
            {},
            ValueError,
            r"Row 1 cannot be imported: A completion is 4. Give text, or a mapping with `text`",
        ),
        ([GOOD, {"prompt": QUESTION, "completion": "x"}], {}, ValueError, r"Row 1 has the prompt \[\{'role'"),
        ([GOOD, {"prompt": "", "completion": "x"}], {}, ValueError, r"Row 1 has the prompt ''; give text or messages"),
        ([GOOD, {**GOOD, "score": 1.0}], {}, ValueError, r"Row 1 has a score, and the first row has none"),
        ([{"prompt": "a", "completions": ["x"], "scores": [1, 2]}], {}, ValueError, r"1 completions and 2 scores"),
        ([GOOD, {**GOOD, "score": math.inf}], {}, ValueError, r"its score is inf. Give a finite number"),
        (
            [{"prompt": "a", "completion": [turn("b"), turn("c")]}],
            {},
            ValueError,
            r"Row 0 cannot be imported: A completion has 2 messages",
        ),
        (
            [response(1, ("4", "stop"))],
            {"requests": [request(1, OTHER), request(1, QUESTION)]},
            ValueError,
            r"Two requests of other content are named 'r1'",
        ),
        ([response(0, ("4", "stop"))], {"requests": [{"id": 1}]}, ValueError, r"Row 0 of `requests` is no request"),
        (
            [response(0, ("4", "stop"))],
            {"requests": [{"custom_id": "r0", "body": {"prompt": ["a", "b"]}}]},
            ValueError,
            r"'r0' asks for several prompts",
        ),
        ([GOOD, {**GOOD, "note": "\ud800"}], {}, ValueError, r"Row 1 cannot be imported: .*surrogates"),
        (
            [GOOD, {"prompt": "b", "completion": "x", "n": "4"}, {"prompt": "c", "completion": "x", "n": 4}],
            {},
            ValueError,
            r"values of several types",
        ),
        ([{**GOOD, "finish_reason": "error"}], {}, ValueError, r"None of 1 rows has a completion .*ended by 'error'"),
        ([response(0, ("4", "stop"))], {}, ValueError, r"answers of an OpenAI batch. Give the file of its requests"),
        ([response(0, ("4", "stop"))], {"requests": [request(1, OTHER)]}, ValueError, r"'r0' has no request"),
        (["a"], {}, ValueError, r"A row is str. Give mappings"),
        ([GOOD, {"prompt": "b", "completion": "\ud800"}], {}, ValueError, r"Row 1 cannot be imported: .*surrogates"),
        ([{**GOOD, "n": 1}, {"prompt": "b", "completion": "x", "n": [2]}], {}, ValueError, r"values of several types"),
        ("no_such.jsonl", {}, FileNotFoundError, r"no_such.jsonl is no file"),
    ],
)
def test_bad_data_are_refused_and_leave_nothing_behind(tmp_path: Path, rows, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        import_candidates(rows, tmp_path / "round", **arguments)
    assert not (tmp_path / "round").exists()


def test_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "x"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"Line 2 of .*a.jsonl is no JSON"):
        import_candidates(tmp_path / "a.jsonl", tmp_path / "round")
    (tmp_path / "a.csv").write_text("prompt,completion\na,x\nb,y,z\n")
    with pytest.raises(ValueError, match=r"Line 3 of .*a.csv has more fields than the first line has names"):
        import_candidates(tmp_path / "a.csv", tmp_path / "round")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a.txt is none of .jsonl, .json, .csv, .parquet"):
        import_candidates(tmp_path / "a.txt", tmp_path / "round")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds neither a list of rows, each an object, nor `instances`"):
        import_candidates(tmp_path / "a.json", tmp_path / "round")
    assert not (tmp_path / "round").exists()
    import_candidates([GOOD], tmp_path / "round")
    with pytest.raises(FileExistsError, match=r"is not empty"):
        import_candidates([GOOD], tmp_path / "round")


def test_scoring_a_round_that_was_not_imported_wants_prompts(tmp_path: Path) -> None:
    imported = import_candidates([GOOD], tmp_path / "round")
    for path in (imported / "prompts").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"was not imported, so it holds no `prompts`"):
        score_again(imported, tmp_path / "scored", lambda completions, **_: [1.0] * len(completions))


def test_shards_hold_a_few_thousand_candidates(tmp_path: Path) -> None:
    folder = import_candidates(
        ({"prompt": f"p{n % 7}", "completion": f"c{n}"} for n in range(9000)), tmp_path / "round"
    )
    assert [pq.read_metadata(path).num_rows for path in sorted(folder.glob("*.parquet"))] == [4096, 4096, 808]
    found = load_candidates(folder)
    assert len({(row, index) for row, index in zip(found["prompt_id"], found["candidate"], strict=True)}) == 9000
