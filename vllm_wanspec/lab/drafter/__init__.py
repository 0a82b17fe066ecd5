"""What a drafter costs: running branches, and our route beside the bare engine."""
