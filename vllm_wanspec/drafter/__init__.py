"""The draft side: what runs beside the draft model."""
