"""Tokenization: prompts through the chat template for the engine, and training rows from sampled token ids.

Training uses the sampled tokens: decoding and encoding again would change them. The prompt is masked from the loss,
end-of-sequence tokens are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from rsft_hf.engines.generation_config import end_tokens
from rsft_hf.generative.prompts import Prompt, message_text, template_arguments

_TAIL = 8  # tokens of a prompt that decide how the next one is written

IGNORED = -100  # what torch's cross-entropy leaves out

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Encoder:
    """Encodes prompts, decodes what was sampled, and makes training rows.

    Args:
        tokenizer: The model's own.
        is_encoder_decoder: Whether the answer is read apart from the prompt.
        chat_template_kwargs: Handed to `apply_chat_template`, such as `enable_thinking`.
        end_tokens: What may end an answer; the tokenizer's end token where a chat template writes none of them.
    """

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_tokens: Sequence[int] = ()

    @classmethod
    def for_model(
        cls, tokenizer: PreTrainedTokenizerBase, model: Any, chat_template_kwargs: Mapping[str, Any] | None
    ) -> "Encoder":
        """Returns the encoder of a model that generates."""
        ends = end_tokens(model.generation_config)
        return cls(tokenizer, bool(model.config.is_encoder_decoder), dict(chat_template_kwargs or {}), ends)

    def prompt_ids(self, prompt: Prompt, columns: Mapping[str, Any] | None = None) -> list[int]:
        """Returns the token ids a model continues from: text as the tokenizer encodes it, messages by chat template.

        Args:
            prompt: Text or messages. Text that a chat template has rendered gets no second beginning-of-sequence token.
            columns: Other columns of the row, of which `tools` and `chat_template_kwargs` go to the chat template.

        Raises:
            ValueError: If the prompt is neither, is empty, or messages come without a chat template.
        """
        if isinstance(prompt, str):
            ids, begin = self.tokenizer(prompt)["input_ids"], self.tokenizer.bos_token_id
            if not self.is_encoder_decoder and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # a tokenizer that closes every text: the model would continue after the end
            if begin is not None and list(ids[:2]) == [begin, begin]:
                ids = ids[1:]
        else:
            ids = self._chat_ids(prompt, columns, is_answered=False)
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens. Give every prompt at least one.")
        return list(ids)

    def text(self, token_ids: Sequence[int]) -> str:
        """Returns sampled tokens as text, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def separator(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Returns what stands between a prompt of text and `text(token_ids)` after it.

        SentencePiece and WordPiece tokenizers drop the space that begins a text: "Paris" after "The capital is" is
        " Paris".
        """
        text, end = self.text(token_ids), list(prompt_ids[-_TAIL:])
        before, both = self.text(end), self.text([*end, *token_ids])
        is_whole = both.startswith(before) and both.endswith(text) and len(both) >= len(before) + len(text)
        return both[len(before) : len(both) - len(text)] if is_whole and not self.is_encoder_decoder else ""

    def training_row(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Row:
        """Returns `input_ids`, `attention_mask` and `labels` of one row, unpadded.

        Decoder-only, prompt [5, 6] and completion [7, 2] give input_ids [5, 6, 7, 2] and labels [-100, -100, 7, 2].
        """
        prompt, completion = list(prompt_ids), list(completion_ids)
        if self.is_encoder_decoder:
            return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": completion}
        return {
            "input_ids": prompt + completion,
            "attention_mask": [1] * (len(prompt) + len(completion)),
            "labels": [IGNORED] * len(prompt) + completion,
        }

    def completion_ids(self, prompt: Prompt, completion: Prompt, columns: Mapping[str, Any] | None = None) -> list[int]:
        """Returns the token ids of an answer that was written, not sampled, closed by one end token.

        Args:
            prompt: As in `prompt_ids`.
            completion: Text, or messages that begin with an assistant's.
            columns: As in `prompt_ids`.

        Raises:
            ValueError: If a chat template does not continue the prompt when the answer follows it, or a prompt is text
                and the answer is not.
        """
        if not isinstance(prompt, str):
            start = self.prompt_ids(prompt, columns)
            whole = self._chat_ids(_conversation(prompt, completion), columns)
            if whole[: len(start)] != start:
                raise ValueError(
                    "The chat template does not begin a conversation with its own generation prompt, so the answer "
                    "cannot be told from the prompt. Give the rows with `input_ids` and `labels` instead."
                )
            return self._closed(whole[len(start) :])
        if not isinstance(completion, str):
            raise ValueError(f"The answer {completion!r} to the text {prompt[:60]!r} is no text. Give a string.")
        if self.is_encoder_decoder:
            return self._closed(list(self.tokenizer(text_target=completion)["input_ids"]))
        # After the prompt, since a tokenizer may put a space before every text.
        start, whole = self.prompt_ids(prompt, columns), self.prompt_ids(prompt + completion, columns)
        if completion and whole[: len(start)] == start:
            return self._closed(whole[len(start) :])
        return self._closed(list(self.tokenizer(completion, add_special_tokens=False)["input_ids"]))

    def without_padding(self, completion_ids: Sequence[int], is_cut_off: bool) -> list[int]:
        """Returns the tokens of an answer as another program stored them, without padding.

        Args:
            completion_ids: May go on with padding or end tokens, or lack the end token.
            is_cut_off: Whether it reached the limit, so that nothing ends it; else one end token does.

        Example:
            >>> from transformers import AutoTokenizer
            >>> tokenizer = AutoTokenizer.from_pretrained("recipes/data/sums/model")
            >>> end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
            >>> Encoder(tokenizer, False).without_padding([7, 9, end, pad, pad], is_cut_off=False) == [7, 9, end]
            True
        """
        ends = {self.tokenizer.eos_token_id, *self.end_tokens}
        length = len(completion_ids)
        while length and completion_ids[length - 1] in {self.tokenizer.pad_token_id, *ends}:
            length -= 1
        kept = list(completion_ids[:length])
        found = [token for token in completion_ids[length:] if token in ends]
        return kept if is_cut_off else [*kept, found[0]] if found else self._closed(kept)

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        lengths = [number + 1 for number, token in enumerate(ids) if token == end or token in self.end_tokens]
        # A chat template may write a line break after the end token.
        if lengths and (lengths[-1] >= len(ids) - 1 or not self.tokenizer.decode(ids[lengths[-1] :]).strip()):
            return ids[: lengths[-1]]
        return ids if end is None else [*ids, end]

    def _chat_ids(
        self, messages: Sequence[Mapping[str, Any]], columns: Mapping[str, Any] | None, is_answered: bool = True
    ) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "Prompts are lists of messages and the tokenizer has no chat template. Set `tokenizer.chat_template`, "
                "or give prompts as text."
            )
        arguments = {**self.chat_template_kwargs, **template_arguments(columns or {})}
        continues = not is_answered and bool(arguments.pop("continue_final_message", False))
        arguments |= {"continue_final_message": continues, "add_generation_prompt": not is_answered and not continues}
        try:
            encoded = self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **arguments)
        except (TypeError, jinja2.TemplateError) as error:
            raise ValueError(
                f"The chat template cannot render {list(messages)!r}: {error}. Give the messages in the form that it "
                "reads, or set another `tokenizer.chat_template`."
            ) from error
        return list(encoded["input_ids"])


def _conversation(prompt: Sequence[Mapping[str, Any]], completion: Prompt) -> list[Mapping[str, Any]]:
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    if prompt[-1].get("role") != "assistant":
        return [*prompt, *answer]
    text = message_text(prompt[-1].get("content")) + message_text(answer[0].get("content"))
    return [*prompt[:-1], {**prompt[-1], "content": text}, *answer[1:]]


@dataclass(frozen=True)
class RowCollator:
    """Pads training rows on the right: `input_ids` with the padding token, `labels` with -100.

    The mask comes from the rows, so that a padding token equal to the end token does not hide a real end.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Returns a batch, each tensor of shape (rows, longest)."""
        paddings = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {name: _padded([row[name] for row in rows], padding) for name, padding in paddings.items()}


def _padded(values: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    rows = [torch.as_tensor(value, dtype=torch.long) for value in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
