"""Pretrained masked language models of Hugging Face: loaded as teachers, made few-step students.

    teacher = load_masked_lm("bert-base-uncased")      # a name on the hub, or a folder
    student = student_of(teacher, layer=8)             # λ joins after layer 8; below is frozen
    save_student(student, "student")
    student = load_student("student")
    tokens = sample_masked(
        student.model, (4, 64), mask_id=student.mask_id, steps=4, latent_dim=student.latent_dim
    )

A student's folder holds config.json and the tokenizer as Hugging Face writes them, and
student.safetensors with all weights and the student's settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..checks import check_int, check_within
from ..models.latent import LatentShift
from ..models.linear_output import output_layer
from ..models.masked_lm import MaskedLM
from ..models.wrappers import ShiftedModel, position_limit, with_latent_shift
from .checkpoint import read_checkpoint, write_checkpoint

__all__ = ["Pretrained", "load_masked_lm", "load_student", "save_student", "student_of"]

WEIGHTS, FORMAT = "student.safetensors", "di4c_fast.student/1"
NEVER = -1e4  # an output bias that leaves a probability of exactly 0


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A masked language model and what belongs to it.

    Attributes:
        model: callable (tokens (R, D), t (R,), **context), a student with λ (R, L) as its third
            argument, to a head (R, D, V); in eval mode.
        tokenizer: of transformers, or None.
        mask_id: the mask token.
        latent_dim: L of a student, 0 for a teacher.
    """

    model: nn.Module
    tokenizer: Any
    mask_id: int
    latent_dim: int = 0

    @property
    def masked_lm(self) -> MaskedLM:
        return self.model.model if isinstance(self.model, ShiftedModel) else self.model  # type: ignore[return-value]

    @property
    def config(self) -> Any:
        """That of the Hugging Face model."""
        return self.masked_lm.model.config

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def positions(self) -> int | None:
        """The longest row that the model takes; None where it has no table of positions."""
        return position_limit(self.masked_lm.model)


def load_masked_lm(
    name: str | os.PathLike[str], *, mask_id: int | None = None, tokenizer: bool = True
) -> Pretrained:
    """A masked language model as a frozen teacher.

    Special tokens of the tokenizer other than the mask get an output bias of -10,000 where the
    output layer has a bias: neither the teacher nor its students draw them.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the hub.
        mask_id: the mask token; None for the tokenizer's.
        tokenizer: False where token ids are all that is used.

    Raises:
        ImportError: transformers is missing; the message has the line that installs it.
        ValueError: there is no such model; it is not a masked language model, or its output layer
            has no weights in the files; it has no mask token; its tokenizer has another vocabulary.
    """
    transformers = _transformers()
    name = os.fspath(name)
    with _loading(name, "masked language model"):
        model, report = transformers.AutoModelForMaskedLM.from_pretrained(
            name, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if missing[3:] else ''}: a masked language model "
            "must come with its output layer, not only with its encoder"
        )
    found = None
    if tokenizer:
        with _loading(name, "tokenizer"):
            found = transformers.AutoTokenizer.from_pretrained(name)
    size = int(model.config.vocab_size)
    if found is not None and len(found) > size:
        raise ValueError(
            f"the tokenizer of {name} has {len(found)} tokens and its model {size}: "
            "it must be the one that the model was trained with"
        )
    if mask_id is None:
        mask_id = getattr(found, "mask_token_id", None)
    if mask_id is None:
        whose = f"the tokenizer of {name}" if tokenizer else name
        raise ValueError(f"{whose} has no mask token; say which id it is with mask_id")
    if not check_int(mask_id, "mask_id", minimum=0) < size:
        raise ValueError(f"mask_id must be in [0, {size}), got {mask_id}")
    layer = output_layer(model)
    if found is not None and layer is not None and layer.bias is not None:
        special = [i for i in found.all_special_ids if i != mask_id]
        with torch.no_grad():
            layer.bias[special] = NEVER
    return Pretrained(MaskedLM(model.eval().requires_grad_(False)), found, mask_id)


def student_of(
    teacher: Pretrained, *, layer: int | None = None, latent_dim: int = 1, scale: float = 1000.0
) -> Pretrained:
    """A student to train: λ is added to the output of one layer, what lies below is frozen.

    Layers up to that one are the teacher's and run once for all rows that are alike, as
    the components at x_t are. Embeddings, and output weights tied to them, are frozen as well.

    Args:
        layer: λ joins after so many layers; None for half of them.
        latent_dim: L.
        scale: factor on λ before its sinusoids, see `LatentEmbedding`.
    """
    stack, count = _layers(teacher.masked_lm)
    layer = count // 2 if layer is None else layer
    if not 1 <= check_int(layer, "layer") < count:
        raise ValueError(f"layer must be in [1, {count}), as the model has {count}, got {layer}")
    check_within(scale, "scale", "(0, inf)")
    student = with_latent_shift(
        teacher.masked_lm,
        f"{stack}.{layer - 1}",
        width=int(teacher.config.hidden_size),
        latent_dim=latent_dim,
        # Components that are equal have the gradient of one component, and would stay equal.
        zero_init=False,
        scale=scale,
        share=True,
    ).eval()
    student.requires_grad_(False)
    student.latent.requires_grad_(True)
    nn.init.zeros_(student.latent.embedding.project.bias)
    above = list(student.model.get_submodule(stack).children())[layer:]
    model: Any = student.model.get_submodule("model")
    kept = {*model.base_model.parameters(), *model.get_input_embeddings().parameters()}
    head = [parameter for parameter in model.parameters() if parameter not in kept]
    for parameter in (*head, *(p for part in above for p in part.parameters())):
        parameter.requires_grad_(True)
    return dataclasses.replace(teacher, model=student, latent_dim=latent_dim)


def save_student(student: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Write a student's folder, which is made; files there are replaced one by one.

    Raises:
        OSError: it cannot be written; weights that were there are then as they were.
    """
    folder, model = pathlib.Path(folder), student.model
    assert isinstance(model, ShiftedModel)
    folder.mkdir(parents=True, exist_ok=True)
    embedding = model.latent.embedding
    settings = {
        "module": model.module,
        "share": model.share,
        "width": embedding.width,
        "latent_dim": embedding.dim,
        "frequencies": embedding.frequencies,
        "scale": embedding.scale,
        "mask_id": student.mask_id,
        "linear_head": student.masked_lm.linear_head,
    }
    student.config.save_pretrained(folder)
    if student.tokenizer is not None:
        student.tokenizer.save_pretrained(folder)
    write_checkpoint(folder / WEIGHTS, FORMAT, model.state_dict(), settings)


def load_student(folder: str | os.PathLike[str]) -> Pretrained:
    """What `save_student` wrote, in eval mode, on the CPU, no parameter asking for a gradient.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError, ValueError: it is not a student's folder, or a file in it is damaged.
    """
    transformers = _transformers()
    folder = pathlib.Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} is not a student's folder: it has no {WEIGHTS}")
    tensors, settings = read_checkpoint(folder / WEIGHTS, FORMAT)
    with _loading(folder, "model"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForMaskedLM.from_config(config)
    tokenizer = None
    if (folder / "tokenizer_config.json").exists():
        with _loading(folder, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mask_id, linear = settings.pop("mask_id"), settings.pop("linear_head")
    module, share = settings.pop("module"), settings.pop("share")
    latent = LatentShift(settings.pop("width"), settings.pop("latent_dim"), **settings)
    student = ShiftedModel(MaskedLM(model, linear_head=linear), module, latent, share)
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its config.json: {error}") from None
    student = student.eval().requires_grad_(False)
    return Pretrained(student, tokenizer, mask_id, latent.dim)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "pretrained models need transformers: pip install 'di4c_fast[pretrained]'"
        ) from error
    transformers.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def _loading(name: Any, what: str) -> Iterator[None]:
    """Errors of transformers as one that says what was asked for, and the reason in one line."""
    try:
        yield
    except ImportError as error:  # a tokenizer's own package
        raise ImportError(f"{name} cannot be loaded: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{name} gives no {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _layers(model: nn.Module) -> tuple[str, int]:
    """Name and length of the stack of layers: the `nn.ModuleList` of as many as the config says."""
    config: Any = model.get_submodule("model").config
    count = int(getattr(config, "num_hidden_layers", 0))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 1:
            return name, count
    raise ValueError(
        "model must have its layers in an nn.ModuleList of config.num_hidden_layers, at least 2, "
        f"got {type(model.get_submodule('model')).__name__} with {count}"
    )


def to_device(found: Pretrained, device: torch.device | str) -> Pretrained:
    """The same with its model moved to a device."""
    try:
        return dataclasses.replace(found, model=found.model.to(device))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device} cannot be used: {_first_line(error)}") from error
