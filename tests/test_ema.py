"""The moving average of a module's weights: its recursion, its swaps, its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from di4c_fast.training import EMA


def averaged_module(weight: float = 1.0) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return fill(module, weight)


def fill(module: nn.Module, weight: float) -> nn.Module:
    with torch.no_grad():
        next(module.parameters()).fill_(weight)
    return module


def average(ema: EMA) -> float:
    return float(next(iter(ema.shadow.values())).flatten()[0])


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_follows_its_recursion(warmup):
    module = averaged_module()
    ema = EMA(module, 0.9999 if warmup else 0.5, warmup=warmup)
    expected = 1.0
    for i, value in enumerate((3.0, 5.0, 2.0), start=1):
        fill(module, value)
        ema.update()
        decay = (1 + i) / (10 + i) if warmup else 0.5
        expected = decay * expected + (1 - decay) * value
    assert average(ema) == pytest.approx(expected, rel=1e-6)


def test_buffers_are_copied():
    module = averaged_module()
    ema = EMA(module, 0.9)
    module(torch.randn(8, 2))
    ema.update()
    assert torch.equal(ema.shadow["1.running_mean"], module[1].running_mean)
    assert int(ema.shadow["1.num_batches_tracked"]) == 1


def test_applied_swaps_the_average_in_and_the_weights_back_even_after_an_error():
    module = averaged_module()
    ema = EMA(module, 0.5, warmup=False)
    fill(module, 3.0)
    ema.update()
    pointer = module[0].weight.data_ptr()

    def fail_inside():
        with ema.applied() as inside:
            assert inside is module
            assert module[0].weight[0, 0].item() == 2.0
            assert module[0].weight.data_ptr() == pointer
            # A state taken now is the average all the same.
            assert ema.state_dict()["shadow"]["0.weight"][0, 0].item() == 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert module[0].weight[0, 0].item() == 3.0
    assert average(ema) == 2.0


def test_half_precision_parameters_are_averaged_in_fp32():
    module = fill(nn.Linear(1, 1).to(torch.bfloat16), 1.0)
    ema = EMA(module, 0.9999, warmup=False)
    fill(module, 2.0)
    for _ in range(10):
        ema.update()
    # In bf16 each step of 1e-4 would round away.
    assert average(ema) == pytest.approx(2 - 0.9999**10, rel=1e-6)
    with ema.applied():
        assert module.weight.dtype == torch.bfloat16
        assert module.weight.item() == 1.0
    assert module.weight.item() == 2.0
    assert average(ema) == pytest.approx(2 - 0.9999**10, rel=1e-6)


def test_the_state_of_an_average_resumes_it():
    first, second = averaged_module(), averaged_module()
    ema, resumed = EMA(first, 0.9), EMA(second, 0.5, warmup=False)
    fill(first, 7.0)
    ema.update()
    resumed.load_state_dict(ema.state_dict())
    second.load_state_dict(first.state_dict())
    for one in (ema, resumed):
        one.update()
    assert (resumed.decay, resumed.warmup, resumed.updates) == (0.9, True, 2)
    torch.testing.assert_close(resumed.shadow, ema.shadow, rtol=0, atol=0)


def test_an_average_refuses_what_would_corrupt_it():
    ema = EMA(averaged_module(), 0.9)
    with ema.applied():
        with pytest.raises(RuntimeError, match=r"inside EMA\.applied"):
            ema.update()
        with pytest.raises(RuntimeError, match="already active"), ema.applied():
            pass
    state = ema.state_dict()
    shadow = state["shadow"]
    for wrong, error, message in (
        ({"decay": 0.9}, ValueError, "must have the key 'warmup'"),
        ({**state, "shadow": {**shadow, "0.bias": 1.0}}, TypeError, "'0.bias'.* must be a Tensor"),
        (
            {**state, "shadow": {k: v for k, v in shadow.items() if k != "0.bias"}},
            ValueError,
            r"0.bias is absent there and \(2,\) here",
        ),
        (
            {**state, "shadow": {**shadow, "0.bias": torch.zeros(3)}},
            ValueError,
            r"0.bias is \(3,\) there and \(2,\) here",
        ),
    ):
        with pytest.raises(error, match=message):
            ema.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        EMA(averaged_module(), 1.0)
    with pytest.raises(TypeError, match=r"module must be a Module, got list"):
        EMA([torch.zeros(2)])


class Cached(nn.Module):
    """Keeps a buffer of the size of its last input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, size: int) -> None:
        self.cache = torch.arange(float(size))


def test_buffers_that_no_checkpoint_holds_are_left_alone_whatever_their_size():
    module = nn.Sequential(Cached())
    ema = EMA(module, 0.5, warmup=False)
    for size in (3, 8, 1):
        module(size)
        ema.update()
    assert set(ema.shadow) == {"0.layer.weight", "0.layer.bias", "0.scale"}
    fill(module, 7.0)
    with ema.applied():
        assert module[0].layer.weight.item() != 7.0
        module(5)
    assert module[0].layer.weight.item() == 7.0
    assert len(module[0].cache) == 5
    # A module that has not run yet takes the state of one that has.
    other = EMA(nn.Sequential(Cached()), 0.5)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.shadow["0.layer.weight"], ema.shadow["0.layer.weight"])


def test_a_module_that_has_changed_its_parts_is_named():
    module = nn.Sequential(Cached())
    ema = EMA(module)
    module.append(nn.Linear(1, 1))
    for call in (ema.update, ema.applied().__enter__):
        with pytest.raises(RuntimeError, match=r"1.bias is absent there and \(1,\) here"):
            call()
    del module[1]
    module[0].scale = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"0.scale is \(2,\) there and \(1,\) here"):
        ema.update()
    assert ema.updates == 0
