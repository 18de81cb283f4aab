"""Heads: where logits come from, so that one `loss` and one `sample` serve every model.

A head stands for a tensor of logits of shape (..., V) without necessarily holding it. The
functions of this package accept a plain tensor wherever they accept a head. `TensorHead`,
`LinearHead` and `LogisticHead` are final; a head of one's own subclasses `Head` and streams
through every backend a few rows at a time.
"""

from .base import Head
from .linear import LinearHead
from .logistic import LogisticHead
from .make import HeadLike, as_head, decode_head
from .tensor import TensorHead

__all__ = ["Head", "HeadLike", "LinearHead", "LogisticHead", "TensorHead", "as_head", "decode_head"]
