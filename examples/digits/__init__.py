"""Di4C from end to end on real handwritten digits: `python -m examples.digits`.

A small transformer teacher is trained, a mixture student is distilled from it with `di4c_fast`,
and both are sampled and judged at a few step counts. `--system` chooses the noise: masked
diffusion, MaskGIT with class labels, or discretised Gaussian diffusion.
"""
