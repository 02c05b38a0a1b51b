"""Generation by an OpenAI-compatible server."""
