"""Tests with real vLLM servers: one drafter, one plain target and one with remote drafts, shared by all of them."""
