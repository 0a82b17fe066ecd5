"""How results are shown: one document as console, Markdown, pictures, and the result file beside it."""
