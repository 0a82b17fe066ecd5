"""vLLM's Model Runner V2: the speculator without a model, and its wraps."""
