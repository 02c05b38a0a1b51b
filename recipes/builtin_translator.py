"""The builtin translator: a small tokenizer and encoder-decoder built in code, so that nothing is downloaded.

In: texts (for the vocabulary) and a seed. Out: a `transformers` tokenizer and a translator with random weights. It
knows nothing of any data set.
"""

import string
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedTokenizerFast, set_seed

LETTERS = string.ascii_lowercase + "äöüß"
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
MAX_POSITIONS = 64


def build_tokenizer(texts: Iterable[str], vocabulary_size: int = 120) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of word parts, one vocabulary for both languages, that ends every text with `</s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(LETTERS),  # so that no word is unknown, only unseen
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MarianMTModel:
    """Returns a Marian of width 96, two layers a side, with random weights; the same seed gives the same ones."""
    width, heads = 96, 4
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=MAX_POSITIONS,
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
    )
    set_seed(seed)
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return model
