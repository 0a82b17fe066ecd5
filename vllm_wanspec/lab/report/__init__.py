"""How results are shown: cells of tables."""
