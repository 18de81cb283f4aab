"""Shared by all tests: Triton's interpreter where there is no GPU, poisoned memory on request."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when a kernel is defined, so it must be set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# 5 to 20 s each, in the interpreter or in processes of their own; CI runs them, too.
SLOW = (
    ("test_recorded_values.py", "gaussian_pixels", "triton-interpreter"),
    ("test_loss_conformance.py", "test_sizes_are_within_the_bound", "triton-40-35-130"),
    ("test_loss_conformance.py", "test_sizes_are_within_the_bound", "triton-33-None-19"),
    ("test_benchmarks.py", "test_the_record_of_a_drop_in"),  # it imports transformers
    ("test_benchmarks.py", "test_gpu_entry_dry_run_writes_few_files"),
    ("test_benchmarks.py", "test_the_child_weighs_known_blocks"),
    ("test_benchmark_confidence.py", "test_the_child_weighs_both"),
    ("test_example_ranks.py", "test_two_processes_train_the_models_of_one"),
    ("test_loss_op.py", "test_same_bits_for_one_and_for_two_threads", "triton"),
    ("test_loss_op.py", "test_compiled_training_step_gives_the_same_numbers", "triton"),
    ("test_draw_conformance.py", "test_tails_keep_their_mass_in_fp32", "20-300000"),
    ("test_tuning.py", "test_tile_sizes_do_not_matter", "3-37"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(all(part in item.nodeid for part in parts) for parts in SLOW):
            item.add_marker("slow")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # not in keywords: a folder may be called so
            item.add_marker(skip)


@pytest.fixture(params=["reference", "torch"])
def backend(request) -> str:
    """The dense truth of the loss, and the passes that compute in float64, too."""
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch) -> Iterator[None]:
    """Uninitialised memory holds NaN (or the largest integer), so an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(before)
