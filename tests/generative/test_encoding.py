"""From prompts to ids and from ids to training rows: what is masked, what is learnt, what is padded."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import generators
import generators as g
from generative_runs import NUM_PROMPTS, CountingEngine, resampler, stored, trained
from rsft_hf.engines.sampling import pad_prompts
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.encoding import IGNORED, Encoder, RowCollator
from rsft_hf.generative.training_rows import encode_candidates

A, B, C = g.A, g.A + 1, g.A + 2
USER, ASSISTANT, THINK = (g.WORDS.index(word) for word in ("user", "assistant", "think"))


def encoder(is_encoder_decoder: bool = False, **keywords) -> Encoder:
    return Encoder(g.tokenizer(closes_text=is_encoder_decoder), is_encoder_decoder, **keywords)


def test_the_prompt_is_masked_and_every_end_token_is_learnt():
    row = encoder().training_row([A, B], [C, g.END, g.EOS])
    assert row == {
        "input_ids": [A, B, C, g.END, g.EOS],
        "attention_mask": [1, 1, 1, 1, 1],
        "labels": [-100, -100, C, g.END, g.EOS],
    }


def test_an_encoder_decoder_reads_the_prompt_apart():
    row = encoder(is_encoder_decoder=True).training_row([A, B, g.EOS], [C, g.EOS])
    assert row == {"input_ids": [A, B, g.EOS], "attention_mask": [1, 1, 1], "labels": [C, g.EOS]}


@pytest.mark.parametrize("pad", [g.PAD, g.EOS], ids=["pad", "pad_is_eos"])
def test_rows_are_padded_on_the_right_and_real_end_tokens_stay(pad):
    rows = [encoder().training_row([A], [B, g.EOS]), encoder().training_row([A, B, C], [C, g.EOS])]
    batch = RowCollator(pad)(rows)
    assert batch["input_ids"].tolist() == [[A, B, g.EOS, pad, pad], [A, B, C, C, g.EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, B, g.EOS, -100, -100], [-100, -100, -100, C, g.EOS]]
    assert {values.dtype for values in batch.values()} == {torch.int64}


PIECES = {
    "metaspace": (["▁the", "▁sea", "son", "▁ends"], pre_tokenizers.Metaspace(), decoders.Metaspace()),
    "wordpiece": (["the", "sea", "son", "ends"], pre_tokenizers.Whitespace(), decoders.WordPiece()),
    "byte_level": (["the", "Ġsea", "son", "Ġends"], pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
}


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize(("cut", "after"), [(1, " season ends"), (2, "son ends"), (3, " ends"), (0, "the season ends")])
def test_prompt_separator_and_text_are_what_was_written(kind: str, cut: int, after: str) -> None:
    after = after.replace("son", " son").replace("  ", " ") if kind == "wordpiece" else after
    words, splits, decoder = PIECES[kind]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "</s>", "<s>"])}))
    made.pre_tokenizer, made.decoder = splits, decoder
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>")
    ids = [5, 0, 1, 2, 3, 4]
    prompt, sampled, own = ids[: cut + 1], ids[cut + 1 :], Encoder(tokenizer, False)
    assert own.separator(prompt, sampled) + own.text(sampled) == after
    assert own.separator(prompt, [4]) == "" == Encoder(tokenizer, True).separator(prompt, sampled)


def test_inputs_and_labels_of_an_encoder_decoder_are_padded_each_to_its_own_width():
    rows = [encoder(True).training_row([A, g.EOS], [B, C, g.EOS]), encoder(True).training_row([A, B, g.EOS], [g.EOS])]
    batch = RowCollator(g.PAD)(rows)
    assert batch["input_ids"].tolist() == [[A, g.EOS, g.PAD], [A, B, g.EOS]]
    assert batch["labels"].tolist() == [[B, C, g.EOS], [g.EOS, IGNORED, IGNORED]]


def test_text_is_encoded_as_the_tokenizer_does_and_never_continued_after_its_end():
    assert encoder().prompt_ids("a b") == [A, B]
    assert encoder(is_encoder_decoder=True).prompt_ids("a b") == [A, B, g.EOS]  # an encoder wants the end
    closing = Encoder(g.tokenizer(closes_text=True), is_encoder_decoder=False)
    assert closing.prompt_ids("a b") == [A, B]
    with pytest.raises(ValueError, match=r"The prompt '' has no tokens"):
        encoder().prompt_ids("")


def turn(role: int, *words: int) -> list[int]:
    return [g.START, role, *words, g.END]


def test_messages_go_through_the_chat_template_turn_by_turn():
    question = [{"role": "user", "content": "a b"}]
    opening = [g.START, ASSISTANT]
    assert encoder().prompt_ids(question) == [*turn(USER, A, B), *opening]
    thinking = encoder(chat_template_kwargs={"enable_thinking": True})
    assert thinking.prompt_ids(question) == [*turn(USER, A, B), *opening, THINK]
    talk = [*question, {"role": "assistant", "content": "c"}, {"role": "user", "content": "b"}]
    assert encoder().prompt_ids(talk) == [*turn(USER, A, B), *turn(ASSISTANT, C), *turn(USER, B), *opening]


def test_messages_without_a_template_are_refused():
    tokenizer = g.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template. Set `tokenizer.chat_template`"):
        Encoder(tokenizer, False).prompt_ids([{"role": "user", "content": "a"}])


def test_written_answers_are_closed_once():
    assert encoder().completion_ids("a", "b c") == [B, C, g.EOS]
    assert encoder().completion_ids("a", "b c <eos>") == [B, C, g.EOS]
    assert encoder(is_encoder_decoder=True).completion_ids("a", "b") == [B, g.EOS]
    closing = Encoder(g.tokenizer(closes_text=True), is_encoder_decoder=False)
    assert closing.completion_ids("a", "b") == [B, g.EOS]


def test_a_written_answer_is_tokenized_behind_its_prompt():
    """A tokenizer that puts a space before every text, as Llama's does, must not put one before the answer."""
    words = ["<pad>", "<eos>", "\u2581a", "\u2581b", "b", "\u2581"]
    model = models.Unigram([(word, 0.0 if len(word) == 2 else -5.0) for word in words], unk_id=0)
    tokenizer = Tokenizer(model)
    space = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    chat = Encoder(made, is_encoder_decoder=False)
    names = lambda ids: made.convert_ids_to_tokens(ids)  # noqa: E731
    assert names(chat.completion_ids("a", " b")) == ["\u2581b", "<eos>"]  # alone: two spaces
    assert names(made(" b", add_special_tokens=False)["input_ids"]) == ["\u2581", "\u2581b"]
    assert names(chat.completion_ids("a", "b")) == ["b", "<eos>"]  # alone: a space that the text has not
    assert names(chat.completion_ids("a ", "b")) == ["\u2581b", "<eos>"]  # one token across the border: alone


def test_an_answer_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match=r"The answer 4 to the text 'a' is no text. Give a string"):
        encoder().completion_ids("a", 4)


@pytest.mark.parametrize(
    ("ids", "is_cut_off", "expected"),
    [
        ([C, g.EOS, g.PAD, g.PAD], False, [C, g.EOS]),
        ([C, g.EOS, g.EOS, g.EOS], False, [C, g.EOS]),  # padded with the end token
        ([C, g.END, g.PAD], False, [C, g.END]),
        ([C], False, [C, g.EOS]),
        ([C, A, g.PAD], True, [C, A]),
        ([], False, [g.EOS]),
    ],
)
def test_stored_answers_lose_their_padding_and_end_once(ids, is_cut_off, expected):
    assert encoder(end_tokens=(g.EOS, g.END)).without_padding(ids, is_cut_off) == expected


def ended_by_turns() -> hf.PreTrainedTokenizerFast:
    """A chat model's tokenizer: the end of a turn is the end token."""
    tokenizer = g.tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize("answer", ["c", [{"role": "assistant", "content": "c"}]], ids=["text", "messages"])
def test_a_written_answer_of_a_conversation_continues_its_prompt(answer):
    question = [{"role": "user", "content": "a"}]
    chat = Encoder(ended_by_turns(), is_encoder_decoder=False)
    assert chat.completion_ids(question, answer) == [C, g.END]
    row = chat.training_row(chat.prompt_ids(question), chat.completion_ids(question, answer))
    whole = chat.tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "c"}], tokenize=True, return_dict=True
    )["input_ids"]
    assert row["input_ids"] == whole
    assert row["labels"] == [-100] * 6 + [C, g.END]  # start user a end start assistant


def test_what_a_template_writes_after_the_end_token_is_not_learnt():
    tokenizer = ended_by_turns()
    tokenizer.chat_template = g.TEMPLATE.replace("<|im_end|> '", "<|im_end|> think '")  # as others write a line break
    ids = Encoder(tokenizer, False).completion_ids([{"role": "user", "content": "a"}], "b")
    assert ids == [B, g.END]


def test_a_template_that_does_not_continue_its_prompt_is_refused():
    chat = encoder(chat_template_kwargs={"enable_thinking": True})  # opens by "think", which no stored turn has
    with pytest.raises(ValueError, match="does not begin a conversation with its own generation prompt"):
        chat.completion_ids([{"role": "user", "content": "a"}], "b")


def merging_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes-of-pairs that write "a" "b" as one token "ab"."""
    pairs = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    pairs.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_the_sampled_tokens_are_the_ones_that_are_learnt(is_encoder_decoder):
    # The model chose "a" then "b"; its text, encoded again, is the one token "ab", which it did not choose.
    made, sampled = Encoder(merging_tokenizer(), is_encoder_decoder), [1, 2, 0]
    text = made.text(sampled)
    assert text == "ab"
    assert made.completion_ids("b", text) == [3, 0]
    candidate = Candidate(0, "b", sampled, text, "stop", is_accepted=True)
    refused = Candidate(1, "b", [2, 0], "b", "stop", is_accepted=False)
    prompt = [] if is_encoder_decoder else [IGNORED]
    rows = encode_candidates([candidate, refused], made)
    assert [row["labels"] for row in rows] == [[*prompt, 1, 2, 0]]


NAMED = "{% for m in messages %}{{ '<|im_start|> ' + m['name'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"


def conversations(**changes: Any) -> datasets.Dataset:
    rows = generators.prompts(NUM_PROMPTS, conversational=True).to_list()
    for number, row in enumerate(rows):
        row["prompt"] = [{**message, "name": generators.LETTERS[number], **changes} for message in row["prompt"]]
    return datasets.Dataset.from_list(rows)


def test_training_rows_begin_with_what_the_engine_saw_whatever_the_template_reads(tmp_path: Path) -> None:
    """The store keeps role and content alone; the prompt is encoded from the data set."""
    engine, words = CountingEngine(), generators.tokenizer()
    words.chat_template = NAMED
    ours = trained(tmp_path, resampler(engine=engine), train_dataset=conversations(), processing_class=words)
    seen = [list(ids) for call in engine.calls for ids in call]
    assert [ids[1] for ids in seen] == [generators.A + number for number in range(NUM_PROMPTS)]
    assert set(stored(tmp_path)[0]["prompt"][0]) == {"role", "content"}
    accepted = [row["token_ids"] for row in stored(tmp_path) if row["is_accepted"]]
    rows = ours.resampler.pool.accepted
    assert [row["input_ids"] for row in rows] == [ids + answer for ids, answer in zip(seen, accepted, strict=True)]


def test_generation_pads_left_and_training_right():
    """Tokens: tests/engines/test_generate.py, greedy tokens of each prompt alone."""
    rows = [[A], [A, B, C]]
    assert pad_prompts(rows, g.PAD, "cpu", is_left=True)["input_ids"].tolist() == [[g.PAD, g.PAD, A], [A, B, C]]
    assert pad_prompts(rows, g.PAD, "cpu", is_left=True)["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert pad_prompts(rows, g.PAD, "cpu", is_left=False)["input_ids"].tolist() == [[A, g.PAD, g.PAD], [A, B, C]]
    encoder = Encoder(g.tokenizer(), is_encoder_decoder=False)
    batch = RowCollator(g.PAD)([encoder.training_row([A], [B]), encoder.training_row([A, B], [C])])
    assert batch["input_ids"].tolist() == [[A, B, g.PAD], [A, B, C]]


def test_sampled_tokens_are_learnt_and_the_prompt_is_not(tmp_path):
    """Tokens that encoding again would change: test_generative_encoding.py."""
    run = g.trainer(tmp_path, g.resampler())
    run.train()
    ids, accepted = g.prompt_ids(4), [one for one in g.stored(run) if one.is_accepted]
    assert any(token < 6 for one in accepted for token in one.token_ids[:-1])  # special tokens, which texts leave out
    for one, row in zip(accepted, run.resampler.pool.accepted, strict=True):
        assert row["input_ids"] == ids[one.prompt_id] + one.token_ids
        assert row["labels"] == [-100] * len(ids[one.prompt_id]) + one.token_ids


def test_every_end_token_ends_and_is_learnt_also_as_padding(tmp_path):
    """Ends: tests/engines/test_generate.py. Padding: test_generative_encoding.py."""
    config = g.sampling(12, eos_token_id=[g.EOS, B], pad_token_id=g.EOS)
    run = g.trainer(tmp_path, g.resampler(generation_config=config, num_candidates=8), num_prompts=6)
    run.train()
    ended = [one for one in g.stored(run) if one.finish_reason == "stop"]
    assert {one.token_ids[-1] for one in ended} == {g.EOS, B}
    batch = run.resampler.collator(hf.default_data_collator)(run.resampler.pool.accepted)
    lasts = [labels[labels != -100][-1].item() for labels in batch["labels"]]
    assert lasts == [row["input_ids"][-1] for row in run.resampler.pool.accepted]
    assert g.EOS in lasts
