"""The group of every kind of case, and the names of all variants."""

from __future__ import annotations

from .ancestral_group import AncestralGroup
from .cases import SHAPES, Case, make_case
from .confidence_group import ConfidenceGroup
from .draw_group import DrawGroup
from .groups import Group
from .loss_group import LossGroup
from .step_group import StepGroup

KINDS: dict[str, type[Group]] = {
    "loss": LossGroup,
    "draw": DrawGroup,
    "ancestral": AncestralGroup,
    "confidence": ConfidenceGroup,
}


def make_group(case: Case) -> Group:
    """The group of a case."""
    return KINDS.get(case.kind, StepGroup)(case)


def all_variants() -> dict[str, str]:
    """Names and titles of every variant of every kind."""
    found = {}
    for kind, shapes in SHAPES.items():
        for shape in shapes if kind == "loss" else list(shapes)[:1]:
            for variant in make_group(make_case(shape, "tiny", "fp32", "cpu")).variants():
                found[variant.name] = variant.title
    return found
