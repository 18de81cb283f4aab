"""The triton backend of `sample` on a GPU: paper shapes, graphs, memory, half precision."""

from __future__ import annotations

import pytest
import torch
from sample_cases import assert_near
from test_loss_gpu import GIB, peak_above_inputs

from di4c_fast import LinearHead, LogisticHead
from di4c_fast.draw.api import Draw, sample
from di4c_fast.testing import assert_draws_match, assert_tail_mass

pytestmark = pytest.mark.gpu


def normal(*shape, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def fused(logits, **arguments) -> Draw:
    return sample(logits, backend="triton", **arguments)


def check(logits, **arguments) -> None:
    """Against the reference on the same rows."""
    arguments = {"seed": 3, "want": "all", "check": False, **arguments}
    ours, truth = fused(logits, **arguments), sample(logits, backend="reference", **arguments)
    if logits.dtype == torch.float32:
        assert_near(ours, truth)
        return
    same = ours.token == truth.token
    # A sum rounded otherwise may move a draw: 1e-7 per block, thousands of blocks per row.
    assert (~same).sum() <= 1
    near = Draw(*(value[same] for value in ours)), Draw(*(value[same] for value in truth))
    assert_near(*near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [27, 507, 1025, 8193, 50257, 50258])
def test_rows_of_paper_shapes(vocabulary, dtype):
    logits = normal(200, vocabulary, dtype=dtype)
    check(logits, mask_id=vocabulary - 1)
    check(logits, temperature=torch.arange(200, device="cuda") % 3 * 0.5)
    other = normal(200, vocabulary, seed=1, dtype=dtype)
    check(logits, guidance=(other, 1.5))


def test_half_precision_rows_are_those_of_fp32():
    logits = normal(500, 50258, dtype=torch.bfloat16)
    ours, wide = (fused(x, seed=1, want="all") for x in (logits, logits.float()))
    assert (ours.token != wide.token).sum() <= 1
    same = ours.token == wide.token
    assert_near(Draw(*(v[same] for v in ours)), Draw(*(v[same] for v in wide)))


@pytest.mark.parametrize(("gap", "rows"), [(16, 30_000), (18, 100_000), (20, 300_000)])
def test_tails_keep_their_mass(gap, rows):
    assert_tail_mass(
        lambda logits: fused(logits.to("cuda"), seed=gap, want=()).token.cpu(), gap, rows
    )


def test_draws_follow_the_softmax():
    logits = normal(430, scale=1.5)
    draw = fused(logits.expand(400_000, -1), seed=17, temperature=1.3, want=())
    assert_draws_match(draw.token, (logits.double() / 1.3).softmax(-1))


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 8 * GIB:
        pytest.skip("needs 8 GiB of free memory")
    rows, vocabulary = 44_000, 50258
    logits = torch.zeros(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 1, rows - 2, rows - 1], device="cuda")
    logits[ends] = normal(4, vocabulary, dtype=torch.bfloat16)
    draw = fused(logits, seed=3, want="all")
    alone = fused(logits[ends], seed=3, row_keys=ends, want="all")
    for value, expected in zip(draw, alone, strict=True):
        torch.testing.assert_close(value[ends], expected, rtol=1e-5, atol=3e-6)


def test_no_host_sync_and_graph_capture():
    logits = normal(64, 50258, dtype=torch.bfloat16)
    weight, hidden = normal(50258, 32, scale=1.0), normal(64, 32, scale=1.0)
    seed = torch.tensor(5, device="cuda")
    step = torch.tensor(0, device="cuda")

    def draw() -> list[torch.Tensor]:
        draws = [
            fused(logits, seed=seed, step=step, want="all", temperature=0.9),
            fused(LinearHead(hidden, weight), seed=seed, step=step, want="entropy"),
        ]
        return [value for draw in draws for value in draw if value is not None]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        draw()  # compiled before the check
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw()
        fused(logits, seed=3, step=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw()
    for number in (0, 7):
        step.fill_(number)
        graph.replay()
        torch.cuda.synchronize()
        for value, expected in zip(captured, draw(), strict=True):
            assert value.equal(expected)


def test_memory_of_logits_and_of_a_linear_head():
    logits = normal(2048, 50258, dtype=torch.bfloat16)
    assert peak_above_inputs(lambda: fused(logits, seed=0, want="all")) < 80 * 2**20
    hidden, weight = normal(1024, 512, dtype=torch.bfloat16), normal(126464, 512).bfloat16()
    head = LinearHead(hidden, weight)
    assert peak_above_inputs(lambda: fused(head, seed=0, want="all")) < 0.5 * GIB


def test_a_linear_head_gives_the_draws_of_its_logits():
    hidden, weight = normal(1024, 64, scale=0.5), normal(8193, 64, scale=0.5)
    head = LinearHead(hidden, weight, budget_bytes=2**20)
    ours, dense = fused(head, seed=1, want="all"), fused(head.logits(), seed=1, want="all")
    same = ours.token == dense.token  # cuBLAS sums in another order for other chunks
    assert (~same).sum() <= 2
    torch.testing.assert_close(ours.entropy, dense.entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_a_logistic_head_never_holds_its_bins(clamp):
    head = LogisticHead(
        normal(98304, scale=0.5), normal(98304, seed=1, scale=0.5), 256, clamp=clamp
    )
    ours, dense = fused(head, seed=1), fused(head.logits(), seed=1)
    assert (ours.token != dense.token).float().mean() < 1e-3
    assert peak_above_inputs(lambda: fused(head, seed=1)) < 98304 * 64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one():
    logits = normal(20, 1025).to("cuda:1")
    check(logits)
    draw = fused(LinearHead(logits[:, :16].contiguous(), logits[:, :16].contiguous()), seed=1)
    assert draw.token.device == torch.device("cuda:1")


def test_a_compiled_call_gives_the_same_draws():
    logits = normal(64, 1025)
    seed = torch.tensor(4, device="cuda")

    def draw(values):
        return tuple(fused(values, seed=seed, want="all", temperature=0.8))

    eager, compiled = draw(logits), torch.compile(draw, fullgraph=True)(logits)
    assert all(value.equal(other) for value, other in zip(eager, compiled, strict=True))
