"""The README's examples run as written, in the order in which they stand."""

from __future__ import annotations

import pathlib
import re

import torch

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def test_python_examples_of_the_readme_run_as_written():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert torch.isfinite(namespace["loss"])
    assert namespace["hidden"].grad.abs().sum() > 0
    tokens = namespace["tokens"]
    assert tokens.shape == (4, 16)
    assert bool((tokens != namespace["mask_id"]).all())
