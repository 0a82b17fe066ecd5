"""The contract of vLLM's seams: what this project needs of vLLM's source, and what is there; nothing is imported."""
