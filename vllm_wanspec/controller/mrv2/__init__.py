"""Remote drafts on vLLM's Model Runner V2."""
