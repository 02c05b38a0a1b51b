"""Engines: what turns prompts into sampled token ids."""
