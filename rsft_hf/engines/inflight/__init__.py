"""In-flight (continuous) batching over a slot KV cache."""
