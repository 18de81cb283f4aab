"""Students from teachers: wrappers that give a model a latent λ without changing its code.

    student = with_latent_token(bert)                     # one more token in a transformer's input
    student = with_latent_shift(unet, "time_embedding")   # an addition to what a submodule returns

A student is an `nn.Module` called as student(tokens, t, latent, **context). Its weights are the
model's, below "model." in the state dictionary, and those of the conditioning, below "latent.".

With its zero-initialised projection (the default) a student of `with_latent_shift` starts exactly
at the teacher, one of `with_latent_token` near it: see `LatentShift` and `LatentToken`.
"""

from __future__ import annotations

import contextlib
import copy as copies
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..checks import check_bool, check_tensor, describe
from ..heads import Head
from .call import Wrapper, check_module
from .latent import LatentShift, LatentToken, check_latent
from .linear_output import head_of, output_layer
from .masked_lm import MaskedLM, has_linear_head

__all__ = ["ShiftedModel", "TokenModel", "with_latent_shift", "with_latent_token"]


def with_latent_shift(
    model: nn.Module,
    module: str,
    *,
    width: int | None = None,
    latent_dim: int = 1,
    zero_init: bool = True,
    frequencies: int = 128,
    scale: float = 1000.0,
    share: bool = False,
    copy: bool = True,
) -> ShiftedModel:
    """A student that adds an embedding of λ to the output of one of the model's submodules.

    It is on the model's device and in its mode.
    The submodule may be a time embedding, (R, C), or anything that returns (R, D, C), such as
    a token embedding. Works for every model that is called as model(tokens, t, **context),
    `MaskedLM` included.

    Args:
        model: the teacher, or any model to start from.
        module: the submodule's name, as `model.get_submodule` takes it. It must not lie inside a
            part whose activations are recomputed in the backward pass (checkpointing).
        width: C; None reads it off the submodule if that is an `nn.Linear`, an `nn.Embedding`, an
            `nn.LayerNorm` or an `nn.Sequential` that contains one.
        latent_dim: L.
        zero_init: start exactly at the model. False gives λ an influence at once.
        frequencies, scale: as in `LatentEmbedding`.
        share: rows with the same tokens, time and context (the components of an example at x_t)
            run through the layers up to and including this one once. The submodule must be one of
            an `nn.ModuleList` whose entries are called one after another, as the layers of
            a transformer are. The students are the same up to rounding; finding the
            rows costs one host sync on a GPU.
        copy: work on a deep copy, so that training the student leaves the teacher alone. If no
            parameter of the model asks for a gradient (a frozen teacher), all of the copy's do.
            False shares the model as it is.
    """
    check_module(model)
    if not isinstance(module, str):
        raise TypeError(f"module must be the name of a submodule, got {describe(module)}")
    check_bool(share, "share")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if module not in names:
        known = f"such as {names[:5]}" if names else "which has none"
        raise ValueError(f"module must name a submodule of the model, {known}, got {module!r}")
    if share and not isinstance(model.get_submodule(module.rpartition(".")[0]), nn.ModuleList):
        raise ValueError(f"share=True needs a module of an nn.ModuleList, got {module!r}")
    found = _width_of(model.get_submodule(module)) if width is None else width
    if found is None:
        kind = type(model.get_submodule(module)).__name__
        raise ValueError(f"width is needed: that of {module!r}, a {kind}, cannot be read off it")
    options: dict[str, Any] = {"zero_init": zero_init, "frequencies": frequencies, "scale": scale}
    latent = LatentShift(found, latent_dim, **options)
    model, latent = _student_of(model, latent, copy)
    return ShiftedModel(model, module, latent, share)


class ShiftedModel(Wrapper):
    """See `with_latent_shift`, which makes it: `model`, and `latent`, the `LatentShift`."""

    def __init__(self, model: nn.Module, module: str, latent: LatentShift, share: bool = False):
        super().__init__(model)
        self.latent, self.module, self.share = latent, module, share

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor, **context: Any) -> Any:
        """(R, D) int64, (R,), (R, L) and the model's context to what the model returns."""
        check_latent(latent, len(tokens), self.latent.dim)
        calls, rows = 0, len(tokens)
        some, every = _distinct(tokens, t, *context.values()) if self.share else (None, None)

        def fewer(module: nn.Module, arguments: Any, keywords: Any) -> Any:
            def cut(value: Any) -> Any:
                rows_of = isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
                return value[some] if rows_of else value

            return tree_map(cut, (arguments, keywords))

        def shift(module: nn.Module, arguments: Any, output: Any) -> Any:
            nonlocal calls
            if self.share and isinstance(output, tuple):  # layers of older transformers
                return (shift(module, arguments, output[0]), *output[1:])
            check_tensor(output, f"the output of module {self.module!r}")
            calls += 1
            return self.latent(output if every is None else output[every], latent)

        # For the length of the call: copies of the student then carry no hook of the original.
        with contextlib.ExitStack() as hooks:
            if some is not None and len(some) < rows:
                for layer in self.shared_layers():
                    hook = layer.register_forward_pre_hook(fewer, with_kwargs=True)
                    hooks.enter_context(hook)
            else:
                every = None
            module = self.model.get_submodule(self.module)
            hooks.enter_context(module.register_forward_hook(shift))
            output = self.model(tokens, t, **context)
        if not calls:
            raise RuntimeError(
                f"the model did not call its module {self.module!r}, so λ had no influence"
            )
        return output

    def shared_layers(self) -> list[nn.Module]:
        """The layers up to and including the shifted one."""
        stack, _, last = self.module.rpartition(".")
        layers: Any = self.model.get_submodule(stack)
        return list(layers[: int(last) + 1])

    def extra_repr(self) -> str:
        return f"module={self.module!r}, share={self.share}"


def _distinct(*values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of one of each kind of rows, and for each row which of them is like it."""
    columns = [v.double().view(torch.int64) if v.is_floating_point() else v.long() for v in values]
    table = torch.cat(
        [column.flatten(1) if column.ndim > 1 else column[:, None] for column in columns], 1
    )
    kinds, every = table.unique(dim=0, return_inverse=True)
    return every.new_empty(len(kinds)).scatter_(
        0, every, torch.arange(len(table), device=table.device)
    ), every


def with_latent_token(
    model: nn.Module,
    *,
    latent_dim: int = 1,
    zero_init: bool = True,
    mask_key: bool = False,
    frequencies: int = 128,
    scale: float = 1000.0,
    linear_head: bool | None = None,
    copy: bool = True,
) -> TokenModel:
    """A student of a transformer with λ as L more tokens behind its input, dropped from its output.

    For models with the interface of Hugging Face: `get_input_embeddings()`, a call with
    `inputs_embeds=` (R, D + L, C), a result with `logits`. t is not given to the model.

    Args:
        model: the teacher, such as `BertForMaskedLM`, also inside a `MaskedLM`.
        latent_dim: L, one token each.
        zero_init: the tokens start as zero vectors, so that λ has no influence at first; it learns
            from there. False: as random vectors of λ.
        mask_key: leave the tokens out of attention (their attention_mask is 0). The student is
            then the model for every λ, up to rounding, and λ learns nothing; for checks, and for
            training the rest first: `student.mask_key` can be changed at any time.
        frequencies, scale: as in `LatentEmbedding`.
        linear_head: as in `MaskedLM`.
        copy: as in `with_latent_shift`.

    Returns:
        `TokenModel`, which returns `LinearHead(hidden, weight, bias)` where the model's output
        layer is plain, else all logits; on the model's device and in its mode.
    """
    if isinstance(model, MaskedLM):
        linear_head = model.linear_head if linear_head is None else linear_head
        model = model.model
    check_module(model)
    check_bool(mask_key, "mask_key")
    if getattr(getattr(model, "config", None), "token_dropout", False):
        raise ValueError(
            "model must treat given embeddings as its own, got a configuration with "
            "token_dropout=True, which rescales those of tokens only; use with_latent_shift"
        )
    embeddings = _input_embeddings(model)
    width = _width_of(embeddings)
    if width is None:
        raise ValueError(
            "the input embeddings of model must be an nn.Embedding, "
            f"got {type(embeddings).__name__}"
        )
    options: dict[str, Any] = {"zero_init": zero_init, "frequencies": frequencies, "scale": scale}
    latent = LatentToken(width, latent_dim, **options)
    if linear_head is None:
        linear_head = has_linear_head(model)
    model, latent = _student_of(model, latent, copy)
    return TokenModel(model, latent, linear_head, mask_key)


class TokenModel(Wrapper):
    """See `with_latent_token`, which makes it: `model`, and `latent`, the `LatentToken`.

    `mask_key` says whether attention leaves the extra tokens out.
    """

    def __init__(self, model: nn.Module, latent: LatentToken, linear_head: bool, mask_key: bool):
        super().__init__(model)
        self.latent, self.linear_head, self.mask_key = latent, linear_head, mask_key

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor, **context: Any) -> Head:
        """(R, D) int64, (R,), (R, L) to a head (R, D, V).

        Of the context, attention_mask, token_type_ids and position_ids (R, D) are lengthened by
        the extra tokens. Without position_ids the model numbers the positions from 0 (RoBERTa:
        from its first), pad tokens included.
        """
        check_latent(latent, len(tokens), self.latent.dim)
        length, extra = tokens.shape[1], self.latent.dim
        limit = position_limit(self.model)
        if limit is not None and length + extra > limit:
            raise ValueError(
                f"tokens must have at most {limit - extra} positions, {limit} of the model's "
                f"position embeddings less L = {extra}, got {length}"
            )
        embeddings = self.latent(_input_embeddings(self.model)(tokens), latent)
        context = self._lengthened(context, tokens)
        layer = output_layer(self.model) if self.linear_head else None

        def call() -> Tensor:
            return self.model(inputs_embeds=embeddings, **context).logits[:, :length]

        return head_of(layer, call, tokens, extra=extra)

    def _lengthened(self, context: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        extra = self.latent.dim
        longer = dict(context)
        if self.mask_key and longer.get("attention_mask") is None:
            longer["attention_mask"] = torch.ones_like(tokens)
        after = torch.arange(1, extra + 1, device=tokens.device)
        ends = {
            "attention_mask": lambda mask: torch.full_like(mask[:, :1], 0 if self.mask_key else 1),
            "token_type_ids": lambda types: types[:, -1:],
            "position_ids": lambda positions: positions.amax(1, keepdim=True) + after,
        }
        for name, end in ends.items():
            given = longer.get(name)
            if given is not None:
                longer[name] = torch.cat([given, end(given).expand(-1, extra)], 1)
        return longer

    def extra_repr(self) -> str:
        return f"linear_head={self.linear_head}, mask_key={self.mask_key}"


def _student_of(model: nn.Module, latent: Any, copy: bool) -> tuple[nn.Module, Any]:
    """The model or a copy of it, and the conditioning on its device."""
    check_bool(copy, "copy")
    if copy:
        model = copies.deepcopy(model)
        if not any(p.requires_grad for p in model.parameters()):
            for p in model.parameters():
                p.requires_grad_(p.is_floating_point())
    parameter = next(model.parameters(), None)
    return model, latent if parameter is None else latent.to(parameter.device)


def _width_of(module: Any) -> int | None:
    match module:
        case nn.Linear(out_features=width) | nn.Embedding(embedding_dim=width):
            return int(width)
        case nn.LayerNorm(normalized_shape=(*_, width)):
            return int(width)
        case nn.Sequential():
            known = [w for part in module if (w := _width_of(part)) is not None]
            return known[-1] if known else None
    return None


def _input_embeddings(model: Any) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if callable(getter) else None
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            "model must have get_input_embeddings() and take inputs_embeds, as the models of "
            f"Hugging Face do, got {type(model).__name__}; with_latent_shift takes any model"
        )
    return embeddings


def position_limit(model: nn.Module) -> int | None:
    """How many positions a table of position embeddings has room for."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa numbers positions from behind the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None
