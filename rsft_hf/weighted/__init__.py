"""The weighted half: examples -> losses -> weights -> indices."""
