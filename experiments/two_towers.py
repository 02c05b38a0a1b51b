"""A classifier of pairs that reads context and response apart, and compares their vectors.

A sentence encoder already knows which texts belong together; a classifier that reads both at once must learn to compare
from nothing, which takes far more steps. This one starts from the encoder's cosine (Sentence-BERT, Reimers & Gurevych
2019, arXiv:1908.10084) and learns the rest.

In: pairs in one sequence, each turn closed by the separator. Out: one logit. Importing this file is what lets
`AutoModelForSequenceClassification.from_pretrained` load such a model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

STARTING_SCALE, STARTING_CENTRE = 8.0, 0.3  # of the cosine: a logit of 0 at the centre

MOST_KNOWN = 20_000  # contexts whose vectors are kept


class TwoTowerConfig(BertConfig):
    """The configuration of an encoder, and the tokens that a sequence is taken apart by."""

    model_type = "two_tower_bert"

    def __init__(self, cls_token_id: int = 101, sep_token_id: int = 102, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cls_token_id, self.sep_token_id = cls_token_id, sep_token_id


class TwoTowerForSequenceClassification(BertPreTrainedModel):
    """Logit of a pair: the scaled cosine of its two vectors, plus what a small head makes of them."""

    config_class = TwoTowerConfig

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.hidden = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.cosine = nn.Linear(1, 1)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self.post_init()

    def start_from_cosine(self) -> None:
        """Sets the head so that the logit is the scaled cosine, and nothing else yet."""
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.bias.zero_()
            self.cosine.weight.fill_(STARTING_SCALE)
            self.cosine.bias.fill_(-STARTING_SCALE * STARTING_CENTRE)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Returns the logits, shape (rows, 1), and with labels of that shape the binary cross-entropy."""
        contexts, responses = self._apart(input_ids, attention_mask.bool())
        first, second = self._context_vectors(contexts), self._vectors(responses)
        features = torch.cat([first, second, (first - second).abs(), first * second], dim=-1)
        cosine = F.cosine_similarity(first, second, dim=-1).unsqueeze(-1)
        logits = self.cosine(cosine) + self.classifier(torch.tanh(self.hidden(features)))
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _apart(self, input_ids: torch.Tensor, is_token: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tokens up to the last separator but one, and those after it, as sequences of their own."""
        contexts, responses = [], []
        for ids, mask in zip(input_ids, is_token, strict=True):
            row = ids[mask]
            separators = (row == self.config.sep_token_id).nonzero().flatten()
            border = int(separators[-2]) + 1 if len(separators) > 1 else 1
            contexts.append(row[:border])
            responses.append(torch.cat([row.new_tensor([self.config.cls_token_id]), row[border:]]))
        return contexts, responses

    def _context_vectors(self, rows: list[torch.Tensor]) -> torch.Tensor:
        # Candidates share their context, which is most of the work: outside of training it is read once.
        if self.training or torch.is_grad_enabled():
            self._known.clear()
            return self._vectors(rows)
        keys = [tuple(row.tolist()) for row in rows]
        if new := {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}:
            self._known.update(zip(new, self._vectors(list(new.values())), strict=True))
        found = torch.stack([self._known[key] for key in keys])
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        return found

    def _vectors(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """The normalised mean of the last hidden states of each sequence, shape (rows, width)."""
        pad = nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=self.config.pad_token_id or 0)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        return F.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)


AutoConfig.register(TwoTowerConfig.model_type, TwoTowerConfig)

AutoModelForSequenceClassification.register(TwoTowerConfig, TwoTowerForSequenceClassification)
