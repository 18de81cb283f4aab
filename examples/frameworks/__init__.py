"""The student of the digits in other trainers: accelerate, Hugging Face's Trainer, Lightning.

    pip install accelerate
    python -m examples.frameworks.accelerate_loop
    torchrun --nproc-per-node 2 -m examples.frameworks.huggingface_trainer

What all of them train is `DistillModule`, whose forward is the whole step. Draws are a function of
(number of the step, number of the example in the global batch), so that an interrupted run goes on
as if it had not stopped, and any number of processes draws the same.
"""
