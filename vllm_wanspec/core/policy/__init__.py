"""Decisions: where to branch, how many drafts to verify, whether to wait, what to look up."""
