"""`python -m di4c_fast`: versions, devices, which backends work, and a check of each of them.

Exits with status 1 if an installed backend disagrees with the reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import di4c_fast

from . import backends

PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors")
# fp32 arithmetic on a few thousand terms against float64: rounding leaves 1e-6 or less.
TOLERANCE = 2e-5


def versions() -> list[tuple[str, str]]:
    """Name and version of this package, Python, and every package it may use."""
    rows = [("di4c_fast", di4c_fast.__version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def devices() -> list[torch.device]:
    """The CPU and every GPU that PyTorch sees."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return (
        f"{device}: {properties.name}, {memory:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}"
    )


def self_check(backend: str, device: torch.device) -> float:
    """Largest relative error of loss and gradient against the reference in float64."""
    expected = _loss_and_gradient("reference", torch.device("cpu"), torch.float64)
    actual = _loss_and_gradient(backend, device, torch.float32)
    errors = [
        float((ours.cpu().double() - truth).norm() / truth.norm())
        for ours, truth in zip(actual, expected, strict=True)
    ]
    return max(errors)


def _loss_and_gradient(
    backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, components, positions, vocabulary = 2, 4, 6, 37
    mask_id = vocabulary - 1
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Rounded to fp32 first, so that both precisions see the same numbers.
        return torch.randn(*shape, generator=generator).to(device, dtype)

    student = random(batch, components, positions, vocabulary).requires_grad_()
    teacher = random(batch, positions, vocabulary)
    consistency = random(batch, components, positions, vocabulary)
    x0 = torch.randint(mask_id, (batch, positions), generator=generator).to(device)
    draws = torch.randint(mask_id, (batch, components, positions), generator=generator).to(device)
    masked = (torch.rand(batch, positions, generator=generator) < 0.7).to(device)
    loss = di4c_fast.loss(
        student,
        teacher,
        x0,
        consistency=consistency,
        consistency_x=draws,
        xt=torch.where(masked, mask_id, x0),
        mask_id=mask_id,
        component_weight=0.5,
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def sample_check(backend: str, device: torch.device) -> float:
    """Largest error of a draw's log-probability against the reference in float64; inf if a token
    differs."""
    logits = 3.0 * torch.randn(64, 1031, generator=torch.Generator().manual_seed(0))
    expected = di4c_fast.sample(logits.double(), seed=0, mask_id=1030, backend="reference")
    actual = di4c_fast.sample(logits.to(device), seed=0, mask_id=1030, backend=backend)
    assert expected.log_prob is not None
    assert actual.log_prob is not None
    if not torch.equal(actual.token.cpu(), expected.token):
        return math.inf
    return float((actual.log_prob.cpu().double() - expected.log_prob).abs().amax())


CHECKS: tuple[tuple[str, Callable[[str, torch.device], float]], ...] = (
    ("backends of the loss (error of loss and gradient against the float64 reference)", self_check),
    ("backends of sample (the same tokens; error of log_prob against it)", sample_check),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m di4c_fast", description=__doc__)
    parser.parse_args(arguments)
    print("versions")
    for name, version in versions():
        print(f"  {name:12} {version}")
    print("devices")
    for device in devices():
        print(f"  {describe_device(device)}")
    failed = False
    for title, check in CHECKS:
        print(title)
        for device in devices():
            for backend in backends.names()[1:]:
                reason = backends.unavailable(backend, device)
                if reason is not None:
                    print(f"  {backend:10} {device!s:8} unavailable: {reason}")
                    continue
                error = check(backend, device)
                verdict = "ok" if error <= TOLERANCE else f"WRONG, at most {TOLERANCE:g} expected"
                failed |= not error <= TOLERANCE
                print(f"  {backend:10} {device!s:8} {verdict} ({error:.1e})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
