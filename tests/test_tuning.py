"""Launch parameters of the Triton kernels: checked, overridden, and without effect on results."""

from __future__ import annotations

import json

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem
from loss_heads import FULL

pytest.importorskip("triton")

from di4c_fast.kernels.triton import tuning

from di4c_fast.passes import triton as triton_passes  # noqa: F401 - registers the records

CPU = torch.device("cpu")
# So small that every loop turns several times at small sizes: tiles, splits of the columns.
SMALL = {
    "row_statistics": {"elements": 8, "warps": 1},
    "marginal": {"elements": 16, "warps": 1, "split_columns": 16},
    "mixture_forward": {"elements": 16, "warps": 1, "split_columns": 8},
    "mixture_backward": {"elements": 16, "warps": 1, "split_columns": 8},
    "row_draw": {"elements": 256, "whole_elements": 128, "rows": 1, "scratch_bytes": 100},
}


@pytest.mark.parametrize("vocabulary", [8, 37])
@pytest.mark.parametrize("teacher_components", [None, 3])
def test_tile_sizes_do_not_matter(vocabulary, teacher_components):
    problem = make_problem(
        1,
        components=5,
        vocabulary=vocabulary,
        teacher_components=teacher_components,
        dtype=torch.float32,
        **FULL,
    )
    problem["consistency_x"] = None

    def run():
        return loss_and_gradients(
            problem, backend="triton", generator=torch.Generator().manual_seed(0)
        )

    expected = run()
    with tuning.override(**SMALL):
        found = run()
    # Sums in another order: a few roundings of the largest summands.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_overrides_are_checked_and_end_with_their_block():
    default = tuning.launch_parameters("marginal", CPU)
    with tuning.override(marginal={"warps": 2}), tuning.override(marginal={"stages": 1}):
        inside = tuning.launch_parameters("marginal", CPU)
        assert (inside.warps, inside.stages) == (2, 1)
        assert inside.elements == default.elements
    assert tuning.launch_parameters("marginal", CPU) == default
    for wrong, message in (
        ({"marginal": {"elements": 100}}, "marginal.elements must be a power of two, got 100"),
        ({"marginal": {"warps": 0}}, "marginal.warps must be a positive int, got 0"),
        ({"marginal": {"tiles": 1}}, "marginal must be an object of"),
        ({"nothing": {}}, "unknown kernel 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message), tuning.override(**wrong):
            pass


def test_configuration_file_with_unknown_field_is_refused(tmp_path):
    path = tmp_path / "some_gpu.json"
    path.write_text(json.dumps({"_measured": "never", "marginal": {"warps": 4}}))
    assert tuning.load_config(path) == {"marginal": {"warps": 4}}
    path.write_text(json.dumps({"marginal": {"forward_warps": 4}}))
    with pytest.raises(ValueError, match=r"some_gpu.json: marginal must be an object of"):
        tuning.load_config(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        tuning.load_config(path)
