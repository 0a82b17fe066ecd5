"""What the target's side costs: the serving path, and steps without drafts."""
