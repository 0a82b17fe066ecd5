"""The target's side: what runs in the target's vLLM process."""
