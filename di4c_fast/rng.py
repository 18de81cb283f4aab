"""Counter-based random numbers: Philox 4x32-10 as plain tensor operations.

Every random number of this package is a pure function of five integers. One Philox call takes a
counter of four and a key of two 32-bit words and gives four 32-bit words:

    key      (seed mod 2^32, seed div 2^32)
    counter  word 0: stream · 2^30 + index div 4        index < 2^32
             word 1: row key mod 2^32
             word 2: row key div 2^32
             word 3: step mod 2^32
    result   output word  index mod 4

Seeds and row keys are 64-bit two's complement. `index` counts blocks in stream `BLOCKS`, vocabulary
ids in stream `TOKENS`, and is the caller's own in stream `FREE`; stream 3 is reserved. The kernels
of the triton backend use the same layout, so a draw does not depend on the backend, and since
nothing else enters, it depends neither on the batch nor on the order in which it is computed.

A word i becomes the uniform number u = (i + ½)·2⁻³². In fp32 that is
`min((float32(i) + 0.5) * 2**-32, 1 - 2**-24)`: the small end keeps all 32 bits (the smallest
u is 2⁻³³ and every i below 2²³ is exact), and u never rounds up to 1. In fp64 it is exact.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .checks import describe

BLOCKS, TOKENS, FREE = 0, 1, 2
WORDS = 4  # 32-bit words per Philox call

Integer: TypeAlias = "int | Tensor"
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: tuple[Integer, Integer, Integer, Integer], key: tuple[Integer, Integer]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four output words for each counter.

    Args:
        counter: four words, ints or int64 tensors that broadcast against each other, each in
            [0, 2^32). At least one must be a tensor; they share a device.
        key: two words in [0, 2^32), ints or 0-dimensional int64 tensors.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32). Nothing is read on
        the host, so the call can be captured in a CUDA graph.

    >>> [hex(int(word)) for word in philox4x32((torch.tensor(0), 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    tensors = [word for word in counter if isinstance(word, Tensor)]
    shape = torch.broadcast_shapes(*(word.shape for word in tensors))
    device = tensors[0].device
    c0, c1, c2, c3, product0, product1 = (
        torch.empty(shape, dtype=torch.int64, device=device) for _ in range(6)
    )
    for buffer, word in zip((c0, c1, c2, c3), counter, strict=True):
        if isinstance(word, Tensor):
            buffer.copy_(word)
        else:
            buffer.fill_(word)
    keys0, keys1 = (_round_keys(word, step) for word, step in zip(key, _KEY_STEPS, strict=True))
    for key0, key1 in zip(keys0, keys1, strict=True):
        # The low 64 bits of a signed product are those of the unsigned one. Words 1 and 3 are
        # only ever xor-ed, so what stands above their 32 bits is cut off together with the sign.
        torch.mul(c0, _MULTIPLIERS[0], out=product0)
        torch.mul(c2, _MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c0.bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_LOW)
        c2.bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_LOW)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    return c0, c1.bitwise_and_(_LOW), c2, c3.bitwise_and_(_LOW)


def _round_keys(word: Integer, step: int) -> tuple[Integer, ...]:
    if isinstance(word, Tensor):
        rounds = torch.arange(_ROUNDS, device=word.device)
        return ((word + rounds * step) & _LOW).unbind()
    return tuple((word + i * step) & _LOW for i in range(_ROUNDS))


def _host_integer(value: Integer) -> Integer:
    """An int where reading one costs no sync: scalar operands are the fastest."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
        return value if torch.compiler.is_compiling() else int(value)
    return value


def random_words(
    seed: Integer,
    step: Integer,
    row_keys: Tensor,
    count: int,
    *,
    stream: int = FREE,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of indices `first .. first + count - 1` of every row, four to a counter.

    Args:
        seed: int, or () int64 on the device of `row_keys`.
        step: int, or int64 of shape () or (R,) on that device; taken modulo 2^32.
        row_keys: (R,) int64.
        count: how many numbers for each row.
        stream: `BLOCKS`, `TOKENS` or `FREE`.
        first: (R,) int64, multiples of 4; None for 0.

    Returns:
        Four int64 tensors of shape (R, ceil(count / 4)): word w of column c belongs to the index
        `first + 4c + w`.
    """
    calls = -(-count // WORDS)
    seed, step = _host_integer(seed), _host_integer(step)
    index = torch.arange(calls, device=row_keys.device)
    if first is not None:
        index = index + (first // WORDS).unsqueeze(-1)
    keys = row_keys.unsqueeze(-1)
    if isinstance(step, Tensor) and step.ndim:
        step = step.unsqueeze(-1)
    counter = (index + (stream << 30), keys & _LOW, (keys >> 32) & _LOW, step & _LOW)
    return philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))


def uniform(
    seed: Integer,
    step: Integer,
    row_keys: Tensor,
    count: int,
    *,
    stream: int = FREE,
    first: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in (0, 1), a function of (seed, step, row key, stream, index) alone.

    Arguments as for `random_words`; `dtype` is float32 or float64. See the module's head for how
    a word becomes a number.

    Returns:
        (R, count).

    >>> uniform(0, 0, torch.tensor([7]), 2).equal(uniform(0, 0, torch.tensor([3, 7]), 9)[1:, :2])
    True
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    words = random_words(seed, step, row_keys, count, stream=stream, first=first)
    numbers = torch.empty((*words[0].shape, WORDS), dtype=dtype, device=row_keys.device)
    for position, word in enumerate(words):
        numbers[..., position].copy_(word)
    numbers.add_(0.5).mul_(2.0**-32)
    if dtype == torch.float32:
        numbers.clamp_(max=1.0 - 2.0**-24)
    return numbers.flatten(1)[:, :count]


def exponential(uniforms: Tensor) -> Tensor:
    """Standard exponential numbers −log(1 − u), positive and finite.

    Small u, which decide who wins an exponential race, keep their full precision.
    """
    return torch.log1p(-uniforms).neg_()


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {describe(generator)}")


def generator_uniform(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1) on `device`, drawn where the generator lives.

    A CPU generator thus gives the same numbers for tensors on every device.
    """
    check_generator(generator)
    source = device if generator is None else generator.device
    drawn = torch.rand(*shape, generator=generator, device=source, dtype=dtype)
    return drawn if device is None else drawn.to(device)


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A fresh seed, () int64 on `device`, from a generator (default: torch's), without a sync."""
    source = device if generator is None else generator.device
    limit = torch.iinfo(torch.int64).max
    seed = torch.randint(limit, (), generator=generator, device=source, dtype=torch.int64)
    if source.type == "cpu" and device.type != "cpu":
        # Filled in by a kernel: a copy from pageable memory would wait for the device.
        return torch.full((), int(seed), dtype=torch.int64, device=device)
    return seed.to(device)
