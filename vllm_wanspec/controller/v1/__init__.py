"""vLLM's V1 model runner: the custom proposer and its wraps."""
