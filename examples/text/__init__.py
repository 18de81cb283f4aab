"""Di4C from end to end on English text, character by character: `python -m examples.text`.

A small transformer teacher is trained by masked diffusion on the text that ships with Python, a
mixture student is distilled from it with `di4c_fast`, and both are sampled and judged at a few
step counts.
"""
