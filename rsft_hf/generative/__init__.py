"""The generative half: candidates are generated, scored, accepted and trained on, round by round."""
