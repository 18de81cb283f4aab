"""Di4C on a pretrained model, antibody loops: `python -m examples.antibody`.

AntiBERTy (arXiv 2112.07782), a masked language model of antibody sequences, is the frozen teacher.
A mixture student of it learns to fill in heavy-chain CDR3 loops in few steps, and both are judged
by the teacher's own chain rule, one residue at a time.
"""
