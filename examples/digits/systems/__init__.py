"""The systems of the example, by name: their recipes and what carries them out."""

from __future__ import annotations

from ..config import Config, GaussianConfig, MaskGITConfig
from .base import System
from .gaussian import GaussianSystem
from .masked import MaskedSystem
from .maskgit import MaskGITSystem

__all__ = ["RECIPES", "System", "system_of"]

_SYSTEMS: dict[type[Config], type[System]] = {
    Config: MaskedSystem,
    MaskGITConfig: MaskGITSystem,
    GaussianConfig: GaussianSystem,
}
RECIPES: dict[str, type[Config]] = {recipe.system: recipe for recipe in _SYSTEMS}


def system_of(config: Config) -> System:
    """What carries out a recipe."""
    return _SYSTEMS[type(config)](config)
