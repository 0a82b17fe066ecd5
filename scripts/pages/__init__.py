"""What the pages of the repository say that a program knows: blocks of figures, made from the result files."""
