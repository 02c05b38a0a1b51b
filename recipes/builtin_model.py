"""The builtin model: a word-level tokenizer and a two-layer BERT built in code, so that nothing is downloaded.

In: texts (for the vocabulary) and a seed. Out: a `transformers` tokenizer and a classifier with random weights. It
knows nothing of any data set.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MAX_POSITIONS = 512


def build_tokenizer(texts: Iterable[str], vocabulary_size: int = 20_000) -> PreTrainedTokenizerFast:
    """Returns a lower-casing word-level tokenizer whose vocabulary is the most frequent words of the texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, num_labels: int, seed: int) -> BertForSequenceClassification:
    """Returns a randomly initialised two-layer BERT of width 96; the same seed gives the same weights."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
    )
    set_seed(seed)
    return BertForSequenceClassification(config)
