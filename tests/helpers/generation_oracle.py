"""Slow oracles of generation: processed distributions and log probabilities by hand, and a model short of memory."""

import torch

import generators as g

NUM_PROMPTS, NUM_CANDIDATES = 5, 3


def ids_for(name: str) -> list[list[int]]:
    """Prompts of 2 to 6 tokens, so that every batch is padded."""
    return g.prompt_ids(NUM_PROMPTS, closes_text=name in g.ENCODER_DECODER)


def cut(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, which is kept."""
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)


SETTINGS = {
    "plain": {},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
    "penalised": {"repetition_penalty": 1.8},
    "pad_is_eos": {"no_repeat_ngram_size": 2, "pad_token_id": g.EOS},
    "kept": {"sequence_bias": [[[g.A], 1.5]]},  # a processor for which rows that ended stay in the batch
}


def processed_by_hand(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Log probabilities after temperature, then the k most probable, then the fewest that hold top_p."""
    found = torch.full_like(logits, -torch.inf)
    for row, values in enumerate((logits / temperature).tolist()):
        order = sorted(range(len(values)), key=lambda token: -values[token])[: top_k or None]
        probabilities = torch.tensor([values[token] for token in order], dtype=torch.float64).softmax(0).tolist()
        before = [sum(probabilities[:place]) for place in range(len(order))]
        kept = [token for token, mass in zip(order, before) if mass < top_p]
        found[row, kept] = torch.tensor([values[token] for token in kept]).log_softmax(0)
    return found


def check_log_probs(model, ids: list[list[int]], found: list, settings: tuple[float, int, float]) -> None:
    """Compares log q and log p of every token with a pass over its candidate alone, to 1e-4."""
    for one in found:
        tokens = torch.tensor(one.token_ids)
        with torch.no_grad():  # one row, no padding
            if model.config.is_encoder_decoder:
                start = [model.config.decoder_start_token_id, *one.token_ids[:-1]]
                logits = model(torch.tensor([ids[one.prompt]]), decoder_input_ids=torch.tensor([start])).logits[0]
            else:
                whole = torch.tensor([ids[one.prompt] + one.token_ids])
                logits = model(whole).logits[0, len(ids[one.prompt]) - 1 : -1]
        log_p = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        log_q = processed_by_hand(logits, *settings).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(one.log_p, log_p, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_q, log_q, atol=1e-4, rtol=0)


def short_of_memory(model, most: int) -> list[int]:
    """Makes the model refuse more than `most` rows, and returns the list to which it adds the rows of each pass."""
    passes: list[int] = []

    def refuse(_, args, keywords):
        rows = keywords["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
        passes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError(f"{len(rows)} rows")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return passes
