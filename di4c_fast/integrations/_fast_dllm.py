"""The caches of Fast-dLLM's LLaDA and Dream classes, for samplers with a window."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checks import check_shape, describe
from ..heads import Head
from ..models.call import check_callable
from ..models.linear_output import head_of, output_layer
from ..samplers.caches import KeyValues, Window

NEEDED = {"past_key_values", "use_cache", "replace_position"}


class CachedModel:
    """A model of Fast-dLLM's as a callable (tokens, t, window=None, attention_mask=None).

    Its keys stand in the order of positions, unrotated. Behind a prefix it appends those of the
    call; among all of them it replaces those at `replace_position`, here (1, D): its own loops pass
    (B, D), which repeats the positions B times. An attention mask (R, D) of real tokens reaches
    every product of queries and keys; the classes drop theirs or take that of another shape.

    Args:
        model: `LLaDAModelLM` or `DreamModel` of Fast-dLLM.
        scale: what it multiplies the logits of its last layer with.
    """

    windows = ("suffix", "block")

    def __init__(self, model: Any, scale: float = 1.0):
        check_callable(model, "model")
        if hasattr(model, "_orig_mod"):
            raise ValueError("model must not be compiled to keep keys, got one that is")
        names = set(inspect.signature(getattr(model, "forward", model)).parameters)
        if not names >= NEEDED:
            raise TypeError(
                f"model must take {', '.join(sorted(NEEDED))}, as LLaDAModelLM and DreamModel of "
                f"Fast-dLLM (24cc59e) do, got {describe(model)} without "
                f"{', '.join(sorted(NEEDED - names))}"
            )
        self.model, self.scale, self.kept = model, scale, KeyValues()
        self.among = {"dual_cache": True} if "dual_cache" in names else {}

    def __call__(
        self,
        tokens: Tensor,
        t: Tensor,
        *,
        window: Window | None = None,
        attention_mask: Tensor | None = None,
    ) -> Head:
        if attention_mask is not None:
            sizes = (len(tokens), tokens.shape[1] if window is None else window.length)
            check_shape(attention_mask, "attention_mask", "R, D", sizes)
        first = window is not None and window.first
        options: dict[str, Any] = {"use_cache": first}
        if window is not None and not first:
            kept = self.kept.rows(window)
            if window.kind == "suffix":
                kept = [tensor.narrow(-2, 0, window.start) for tensor in kept]
            else:
                place = torch.arange(window.length, device=tokens.device)
                inside = (place >= window.start) & (place < window.stop)
                options |= {"replace_position": inside[None], **self.among}
            options["past_key_values"] = list(zip(kept[::2], kept[1::2], strict=True))

        def call() -> Tensor:
            with contextlib.ExitStack() as stack:
                if attention_mask is not None:
                    # LLaDA compiles its attention, and a graph knows no mask of another call.
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                    stack.enter_context(Attending(attention_mask))
                output = self.model(tokens, **options)
            if window is not None and first:
                pairs = output.past_key_values
                self.kept.store([tensor for pair in pairs for tensor in pair], window)
            return output.logits

        return head_of(output_layer(self.model), call, tokens, scale=self.scale)


class Attending(TorchFunctionMode):
    """Every scaled dot-product attention sees the real keys alone, (R, D)."""

    def __init__(self, real: Tensor):
        super().__init__()
        self.mask, self.used = rearrange(real.bool(), "r d -> r 1 1 d"), False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            kwargs, self.used = {**kwargs, "attn_mask": self.mask}, True
        return function(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if not self.used and exception[0] is None:
            raise ValueError(
                "attention_mask needs a model with torch's scaled_dot_product_attention, "
                "which this one does not call"
            )
