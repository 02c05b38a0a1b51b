"""Prompts as people have them: tools, template arguments, prefills, parts, text that was rendered, transforms."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as hf
import trl
from tokenizers import processors

import generators as g
from generative_runs import CountingEngine, resampler, stored, trained
from rsft_hf import export_dpo, export_kto, export_sft
from rsft_hf.acceptance import TopKPerPrompt
from rsft_hf.generative import accept_again, score_again
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.prompts import PromptSet

TOOLS_FIRST = "{% if tools %}{{ 'system ' + tools[0]['function']['name'] + ' ' }}{% endif %}" + g.TEMPLATE
# Parts of text, and turns that only call a tool.
TURNS = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' }}"
    "{% if m['content'] is string %}{{ m['content'] + ' ' }}"
    "{% elif m['content'] %}{% for part in m['content'] %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}{{ 'think ' + call['function']['name'] + ' ' }}{% endfor %}"
    "{{ '<|im_end|> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def words(template: str = g.TEMPLATE) -> hf.PreTrainedTokenizerFast:
    tokenizer = g.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {name: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def prompted(ours: Any) -> list[str]:
    """What the pool's rows were prompted with, as text."""
    tokenizer = ours.processing_class
    rows = ours.resampler.pool.accepted
    return [tokenizer.decode(row["input_ids"][: row["labels"].count(-100)]) for row in rows]


def rendered_by_trl(rows: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    prompts = []
    for row in rows:
        example = {name: row[name] for name in ("prompt", "chat_template_kwargs") if name in row}
        prompts.append(trl.apply_chat_template(example, tokenizer, tools=row.get("tools"))["prompt"].strip())
    return prompts


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_arguments_of_each_row_are_rendered_as_trl_does(tmp_path: Path, as_json: bool) -> None:
    seen: list[Any] = []

    def reward(completions: list, tools: list, chat_template_kwargs: list, **_: Any) -> list[float]:
        seen.extend(zip(tools, chat_template_kwargs, strict=True))
        return [1.0 / (1 + number) for number in range(len(completions))]

    rows = [{"prompt": [user("a")], "tools": [tool(name)], "chat_template_kwargs": {}} for name in "bc"]
    rows[1]["chat_template_kwargs"] = {"enable_thinking": True}
    given = [{**row, "tools": json.dumps(row["tools"])} if as_json else row for row in rows]
    engine = CountingEngine()
    made = resampler(reward, engine=engine)
    train_dataset = datasets.Dataset.from_list(given)
    ours = trained(tmp_path, made, train_dataset=train_dataset, processing_class=words(TOOLS_FIRST))
    expected = rendered_by_trl(rows, words(TOOLS_FIRST))
    assert engine.prompts() == expected == prompted(ours)
    assert ["system b" in expected[0], "think" in expected[1]] == [True, True]
    # Arrow gives the tools of all rows the parameters of all tools, null where they have none.
    assert seen[0] == (given[0]["tools"], {})
    assert seen[-1] == (given[1]["tools"], {"enable_thinking": True})
    # A resumed run takes them from its data set, an export from the store.
    accepted = [one for one in g.stored(ours) if one.is_accepted]
    encoded = ours.resampler.encode(accepted, ours.processing_class)
    assert encoded["input_ids"] == [row["input_ids"] for row in ours.resampler.pool.accepted]
    exported = export_sft(tmp_path / "candidates")
    assert [json.loads(row["tools"])[0]["function"]["name"] for row in exported] == ["b", "c"]
    assert exported[1]["chat_template_kwargs"]["enable_thinking"]


def test_exports_have_what_a_run_hands_to_the_template(tmp_path: Path) -> None:
    made = resampler(chat_template_kwargs={"enable_thinking": True})
    rows = [{"prompt": [user(name)], "wanted": "a"} for name in "ab"]
    ours = trained(tmp_path, made, train_dataset=rows, processing_class=words())
    exported = export_sft(tmp_path / "candidates").to_list()
    assert prompted(ours) == rendered_by_trl(exported, words())
    assert all(text.endswith("think") for text in prompted(ours))
    scored = score_again(tmp_path / "candidates" / "round-000", tmp_path / "scored", g.share_of_wanted, rows)
    again = export_sft(accept_again(scored, tmp_path / "accepted", TopKPerPrompt(1))).to_list()
    assert prompted(ours) == rendered_by_trl(again, words())


def test_a_rows_template_arguments_win_over_the_runs() -> None:
    encoder = Encoder(words(), False, {"enable_thinking": True})
    ids = [encoder.prompt_ids([user("a")], row) for row in ({}, {"chat_template_kwargs": {"enable_thinking": False}})]
    assert [g.WORDS[one[-1]] for one in ids] == ["think", "assistant"]


@pytest.mark.parametrize("columns", [{"tools": "no JSON"}, {"tools": ["add"]}, {"chat_template_kwargs": "thinking"}])
def test_columns_that_the_template_cannot_read_are_named(tmp_path: Path, columns: dict[str, Any]) -> None:
    name, value = next(iter(columns.items()))
    with pytest.raises(ValueError, match=f"row 0 of `train_dataset` has `{name}`=.*{value[0]}"):
        trained(tmp_path, train_dataset=[{"prompt": [user("a")], "wanted": "a", **columns}] * 2)
    # Text prompts have no template, so the column is a reward's.
    trained(tmp_path, train_dataset=[{"prompt": "a", "wanted": "a", **columns}] * 2)


CALLED = [user("a"), assistant(None, tool_calls=[{"type": "function", "function": {"name": "b", "arguments": {}}}])]


def test_parts_of_text_and_null_content_are_rendered_and_stored(tmp_path: Path) -> None:
    prompts = [[user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], [*CALLED, user("c")]]
    rows = [{"prompt": prompt, "wanted": "a"} for prompt in prompts]
    ours = trained(tmp_path, train_dataset=rows, processing_class=words(TURNS))
    assert prompted(ours) == rendered_by_trl(rows, words(TURNS))
    assert "think b" in prompted(ours)[1]
    assert [one.prompt for one in g.stored(ours)[::4]] == prompts
    assert [row["prompt"][0]["content"] for row in stored(tmp_path)[::4]] == ["ab", "a"]
    messages = export_sft(tmp_path / "candidates", as_messages=True)["messages"]
    assert messages[0][0] == {"role": "user", "content": "ab", "tool_calls": None}
    assert messages[1][1]["tool_calls"][0]["function"]["name"] == "b"


@pytest.mark.parametrize(
    "prompt",
    [
        [user(None)],
        [assistant(None), user("a")],
        [user([{"type": "image", "image": "x.png"}])],
        [user(3)],
        ["a"],
    ],
    ids=["null", "null without a call", "image", "number", "no message"],
)
def test_content_that_is_not_text_is_refused_before_anything_is_generated(tmp_path: Path, prompt: Any) -> None:
    engine = CountingEngine()
    rows = [{"prompt": one, "wanted": "a"} for one in ([user("a")], prompt)]
    with pytest.raises(ValueError, match="The prompt in row 1 of `train_dataset` has a message whose content is not"):
        trained(tmp_path, resampler(engine=engine), train_dataset=rows)
    assert engine.calls == []
    assert not (tmp_path / "candidates").exists()


@pytest.mark.parametrize("prompt", ["a \ud800", [user("a \ud800")]], ids=["text", "messages"])
def test_half_a_character_is_refused_with_its_row(tmp_path: Path, prompt: Any) -> None:
    rows = [{"prompt": one, "wanted": "a"} for one in (prompt if isinstance(prompt, str) else [user("a")], prompt)]
    with pytest.raises(ValueError, match=r"row [01] of `train_dataset` cannot be stored: .*surrogates not allowed"):
        trained(tmp_path, train_dataset=rows)


def test_nul_and_escapes_are_kept_as_they_are(tmp_path: Path) -> None:
    texts = ["a \0 b", "\x1b[31m a", "=cmd()", "<script>a</script>", "**a** [b](c)"]
    ours = trained(tmp_path, train_dataset=[{"prompt": text, "wanted": "a"} for text in texts])
    assert [one.prompt for one in g.stored(ours)[::4]] == texts
    assert export_sft(tmp_path / "candidates")["prompt"][:] == texts


def test_a_template_that_cannot_read_a_message_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": [user([{"type": "text", "text": "a"}])], "wanted": "a"}] * 2  # ChatML concatenates strings
    with pytest.raises(ValueError, match=r"The chat template cannot render .*can only concatenate str"):
        trained(tmp_path, train_dataset=rows)


BEGUN = [user("a"), assistant("b c")]


def test_an_answer_that_was_begun_is_continued_where_that_is_asked_for(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(completions: list, **_: Any) -> list[float]:
        seen.extend(one[0]["content"] for one in completions)
        return [float(number) for number in range(len(completions))]

    rows = [{"prompt": BEGUN, "reference": " d"}, {"prompt": BEGUN, "reference": [assistant(" d")]}]
    engine = CountingEngine()
    made = resampler(
        reward, TopKPerPrompt(1), chat_template_kwargs={"continue_final_message": True}, engine=engine,
        on_nothing_accepted="reference",
    )  # fmt: skip
    ours = trained(tmp_path, made, train_dataset=rows)
    assert engine.prompts() == rendered_by_trl(rows, words()) == prompted(ours)
    assert prompted(ours)[0].endswith("assistant b c")
    assert all(text.startswith("b c") for text in seen)
    assert len(set(seen)) > 1
    exported = export_sft(tmp_path / "candidates")[0]
    assert exported["prompt"] == BEGUN[:1]
    assert exported["completion"][0]["content"].startswith("b c")
    pair = export_dpo(tmp_path / "candidates")[0]
    assert (pair["prompt"], pair["chosen"][0]["content"][:3]) == (BEGUN[:1], "b c")
    assert export_kto(tmp_path / "candidates")[0]["prompt"] == BEGUN[:1]
    encoder = Encoder(words(), False, {"continue_final_message": True}, [g.END])
    assert [g.WORDS[one] for one in encoder.completion_ids(BEGUN, " d")] == ["d", "<|im_end|>"]
    assert encoder.completion_ids(BEGUN, [assistant(" d")]) == encoder.completion_ids(BEGUN, " d")


@pytest.mark.parametrize(
    ("prompt", "continues", "message"),
    [
        (BEGUN, False, "ends with the assistant's turn.*continue_final_message"),
        ([user("a")], True, "`continue_final_message` continues an assistant's text"),
        ([*CALLED], True, "`continue_final_message` continues an assistant's text"),
    ],
)
def test_prefills_are_refused_where_nothing_can_be_continued(
    tmp_path: Path, prompt: Any, continues: bool, message: str
) -> None:
    rows = [{"prompt": prompt, "chat_template_kwargs": {"continue_final_message": continues}, "wanted": "a"}] * 2
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, train_dataset=rows)


def test_text_that_was_rendered_begins_once() -> None:
    tokenizer = words("{{ bos_token + ' ' }}" + g.TEMPLATE)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", g.BOS)]
    )
    encoder = Encoder(tokenizer, False)
    rendered = tokenizer.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
    assert encoder.prompt_ids(rendered) == encoder.prompt_ids([user("a")])
    assert encoder.prompt_ids("a") == [g.BOS, g.A]


@pytest.mark.parametrize("name", ["with_transform", "numpy", "torch"])
@pytest.mark.parametrize("conversational", [False, True])
def test_prompts_under_a_transform_or_a_format(tmp_path: Path, name: str, conversational: bool) -> None:
    plain = g.prompts(9, conversational)
    if name == "with_transform":
        raw = plain.rename_column("prompt", "question")
        made = raw.with_transform(lambda rows: {"prompt": rows["question"], "wanted": rows["wanted"]})
    else:
        made = plain.with_format(name)
    trained(tmp_path / "plain", train_dataset=plain, eval_dataset=g.prompts(2, conversational, first=82))
    ours = trained(tmp_path / name, train_dataset=made, eval_dataset=made.select(range(2)))
    assert stored(tmp_path / name) == stored(tmp_path / "plain")
    assert ours.evaluate()["eval_length"] > 0
    assert PromptSet(made, "prompt").row(2) == (plain[2]["prompt"], PromptSet(made, "prompt").row(2)[1])


@pytest.mark.parametrize("ends", [g.EOS, [g.EOS, g.END]])
def test_references_end_once_as_the_template_ends(tmp_path: Path, ends: Any) -> None:
    model = g.tiny_model()
    model.generation_config.eos_token_id = ends
    rows = [{"prompt": [user("a")], "reference": "b c"}] * 2
    made = resampler(
        lambda completions, **_: [None] * len(completions), on_nothing_accepted="reference",
        supervised_dataset=[{"prompt": [user("a")], "completion": "b c"}], supervised_fraction=0.5,
    )  # fmt: skip
    ours = trained(tmp_path, made, model=model, train_dataset=rows)
    learnt = ["b", "c", "<|im_end|>"] + (["<eos>"] if ends == g.EOS else [])
    for row in (ours.resampler.pool.accepted[0], ours.resampler.pool.supervised[0]):
        assert [g.WORDS[token] for token in row["labels"] if token != -100] == learnt
