"""What `mutate_kernels` breaks in the C++ passes."""

from __future__ import annotations

from .mutations import Mutation

CPU: list[Mutation] = []
