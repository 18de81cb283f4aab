"""Confidence sampling against a naive loop over dense logits: rules, counts, rows, randomness."""

from __future__ import annotations

import itertools

import pytest
import torch
from naming import stable_id
from torch import Tensor, nn

from di4c_fast.heads import LinearHead
from di4c_fast.samplers import sample_confidence
from di4c_fast.testing import assert_counts_match, assert_frequency

VOCAB, MASK, D, WIDTH = 11, 10, 14, 6
RULES = ("low_confidence", "maskgit_plus", "topk_margin", "entropy")


class Recorder(LinearHead):
    """Notes the rows that are taken from the head of a model call."""

    log: list[Tensor]

    def take(self, rows: Tensor) -> LinearHead:
        if self.hidden.ndim == 3:
            self.log.append(rows)
        return super().take(rows)


class Denoiser(nn.Module):
    """Logits that depend on the position, on neighbours, and on the mean of all tokens.

    In float64, so that the order of confidences does not hang on rounding.
    """

    def __init__(self, seed: int = 0, scale: float = 1.5, mask_bias: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding = nn.Parameter(normal(VOCAB, WIDTH))
        self.position = normal(D, WIDTH)
        self.weight = normal(VOCAB, WIDTH) * scale
        self.bias = torch.zeros(VOCAB, dtype=torch.float64)
        self.bias[MASK] = mask_bias
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.rows: list[Tensor] = []

    def hidden(self, tokens: Tensor, latent: Tensor | None = None) -> Tensor:
        h = self.embedding[tokens]
        h = h + 0.7 * h.roll(1, 1) + self.position[: tokens.shape[1]] + h.mean(1, keepdim=True)
        if latent is not None:
            h = h + latent[:, :1, None].double() * self.position[: tokens.shape[1]]
        return torch.tanh(h)

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> LinearHead:
        self.inputs.append(tokens)
        self.times.append(t)
        if latent is not None:
            self.latents.append(latent)
        head = Recorder(self.hidden(tokens, latent), self.weight, self.bias)
        head.log = self.rows
        return head

    def logits(self, tokens: Tensor) -> Tensor:
        """(D,) -> (D, V), dense."""
        return (self.hidden(tokens[None])[0] @ self.weight.T + self.bias).detach()


def prompts(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive_confidence(row: Tensor, rule: str, top_k=None, top_p=None) -> tuple[int, float]:
    """Token and confidence of one row at temperature 0, one token at a time."""
    raw = row.softmax(-1)
    kept = row.clone()
    if top_p is not None:
        total, order = 0.0, row.argsort(descending=True).tolist()
        for place, token in enumerate(order):
            if place and total > top_p:
                kept[token] = -torch.inf
            total += float(raw[token])
    if top_k is not None:
        kept[row < row.sort(descending=True).values[top_k - 1]] = -torch.inf
    p = kept.softmax(-1)
    token = int(row.argmax())
    ordered = p.sort(descending=True).values
    return token, {
        "low_confidence": float(raw[token]),
        "maskgit_plus": float(p[token]),
        "topk_margin": float(ordered[0] - ordered[1]),
        "entropy": float(torch.where(p > 0, p * p.log(), 0.0).sum()),
    }[rule]


def naive(
    model: Denoiser,
    prompt: Tensor,
    *,
    steps: int | None = None,
    rule: str = "low_confidence",
    schedule: str = "even",
    t_min: float = 1e-3,
    block_length: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    guidance_scale: float = 0.0,
    shift: bool = False,
    exclude_mask: bool = True,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, list[int]]:
    """One sequence by the rules, and how many positions each step filled."""
    start = len(prompt)
    x = torch.full((D,), MASK)
    x[:start] = prompt
    known = x != MASK
    length = block_length or D - start
    blocks = -(-(D - start) // length)
    filled = []
    for block in range(blocks):
        end = min(start + (block + 1) * length, D)
        n = int((x[:end] == MASK).sum())
        per_block = None if steps is None else steps // blocks
        for index in itertools.count():
            active = [d for d in range(end) if x[d] == MASK]
            if not active or (per_block is not None and index == per_block and threshold is None):
                break
            logits = model.logits(x)
            if guidance_scale:
                without = model.logits(torch.where(known, MASK, x))
                logits = without + (guidance_scale + 1) * (logits - without)
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            if exclude_mask:
                logits[:, MASK] = -torch.inf
            logits[:, list(banned)] = -torch.inf
            found = {}
            for d in active:
                token, confidence = naive_confidence(logits[d], rule, top_k, top_p)
                if deferred:
                    rest = logits[d].clone()
                    rest[list(deferred)] = -torch.inf
                    confidence = float(rest.softmax(-1)[token])
                found[d] = (confidence, token)
            order = sorted(active, key=lambda d: (-found[d][0], d))
            count = len(active)
            if per_block is not None and schedule == "even":
                count = n // per_block + (index < n % per_block)
            elif schedule == "ancestral":
                times = torch.linspace(1, t_min, per_block + 1)
                if index < per_block - 1:
                    count = int(len(active) * (1 - times[index + 1] / times[index]))
            if threshold is not None:
                if per_block is not None:
                    reached = sum(
                        n // per_block + (i < n % per_block)
                        for i in range(min(index + 1, per_block))
                    )
                    count = max(1, reached - (n - len(active)))
                passing = [d for d in order if found[d][0] >= threshold]
                count = min(count, max(1, len(passing)))
            if factor is not None:
                count = 1
                while count < len(order):
                    if found[order[count]][0] < 1 - factor / (count + 2):
                        break
                    count += 1
            for d in order[:count]:
                x[d] = found[d][1]
            filled.append(count)
    return x, filled


def check_against_naive(model, prompt, **how):
    mapped = {"banned_ids": how.get("banned", ()), "deferred_ids": how.get("deferred", ())}
    ours = {k: v for k, v in how.items() if k not in ("banned", "deferred")}
    tokens = sample_confidence(
        model, (len(prompt), D), mask_id=MASK, prompt=prompt, seed=0, **ours, **mapped
    )
    expected = torch.stack([naive(model, row, **how)[0] for row in prompt])
    assert torch.equal(tokens, expected)
    return tokens


# Known answers at temperature 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 4},
        {"steps": 4, "block_length": 5},
        {"steps": 30},
        {"steps": 1},
        {"steps": 5, "schedule": "ancestral", "shift": True},
        {"steps": 6, "guidance_scale": 1.3},
        {"steps": 6, "top_p": 0.8, "top_k": 4, "schedule": "ancestral"},
        {"threshold": 0.4, "block_length": 5},
        {"threshold": 0.3},
        {"threshold": 0.3, "steps": 5},
        {"factor": 1.0, "block_length": 5},
        {"factor": 2.0},
        {"steps": 4, "banned": (3, 5)},
    ],
    ids=stable_id,
)
def test_tokens_at_temperature_0_are_those_of_the_naive_loop(rule, how):
    for seed in range(2):
        check_against_naive(Denoiser(seed), prompts(3, 4, seed), rule=rule, **how)


def test_deferred_tokens_come_last_and_others_are_judged_without_them():
    model = Denoiser(2)
    with_deferred = check_against_naive(model, prompts(3, 4), steps=5, deferred=(5, 4))
    guided = {"guidance_scale": 0.8, "deferred": (5, 4)}
    check_against_naive(model, prompts(3, 4), steps=5, **guided)
    assert not torch.equal(with_deferred, check_against_naive(model, prompts(3, 4), steps=5))


def test_a_mask_that_is_drawn_stays_and_the_counts_go_on():
    model = Denoiser(3, mask_bias=4.0)
    for how in ({"steps": 4}, {"steps": 4, "schedule": "ancestral"}):
        tokens = check_against_naive(model, prompts(4, 4), exclude_mask=False, **how)
        assert bool((tokens == MASK).any())
        assert bool((check_against_naive(model, prompts(4, 4), **how) != MASK).all())


def test_a_threshold_gives_the_mask_its_share_but_not_an_endless_loop():
    model = Denoiser(3, mask_bias=1.0)
    how = {"threshold": 0.3, "exclude_mask": False}
    tokens = check_against_naive(model, prompts(3, 4), **how)
    assert not torch.equal(tokens, check_against_naive(model, prompts(3, 4), threshold=0.3))
    model = Denoiser(3, mask_bias=50.0)
    tokens = sample_confidence(model, (2, D), mask_id=MASK, seed=0, **how)
    assert bool((tokens == MASK).all())
    assert len(model.inputs) == D


def test_unknown_tokens_of_a_prompt_are_filled_with_the_first_block_at_each_rows_own_rate():
    prompt = prompts(3, 6)
    prompt[0, 2] = MASK
    prompt[2, :5] = MASK
    check_against_naive(Denoiser(4), prompt, steps=4, block_length=4)
    check_against_naive(Denoiser(4), prompt, threshold=0.4, block_length=4)
    check_against_naive(Denoiser(4), prompt, steps=3, schedule="ancestral")


@pytest.mark.parametrize("rule", ["maskgit_plus", "topk_margin", "entropy", "low_confidence"])
def test_a_confidence_dtype_ranks_by_what_the_repositories_compute(rule):
    class Half(Denoiser):
        def forward(self, tokens, t):
            return super().forward(tokens, t).logits().to(torch.bfloat16)

        def logits(self, tokens):
            p = (super().logits(tokens).to(torch.bfloat16)).softmax(-1)
            return p  # used below only

    model = Half(5)
    history = []
    sample_confidence(
        model, (1, D), mask_id=MASK, steps=D, rule=rule, exclude_mask=False, seed=0,
        confidence_dtype=torch.bfloat16, history=history,
    )  # fmt: skip
    for before, after in itertools.pairwise(history[:6]):
        p = model.logits(before[0])
        top = p.sort(-1, descending=True).values
        confidence = {
            "topk_margin": top[:, 0] - top[:, 1],
            "entropy": (p * torch.log(p + 1e-10)).sum(-1),
        }.get(rule, top[:, 0])
        assert confidence.dtype == torch.bfloat16
        best = confidence.masked_fill(before[0] != MASK, -torch.inf).float().argmax()
        expected = before[0].clone()
        expected[best] = p[best].argmax()
        assert torch.equal(after[0], expected)


def test_equal_confidences_keep_the_lowest_positions():
    history = []
    sample_confidence(
        lambda x, t: torch.zeros(*x.shape, VOCAB), (2, 9), mask_id=MASK, steps=3, history=history
    )
    for step, state in enumerate(history):
        expected = torch.where(torch.arange(9) < 3 * step, 0, MASK)
        assert torch.equal(state, expected.expand(2, 9))


# How many, and what is computed


@pytest.mark.parametrize("steps", [1, 3, 4, 10, 13])
def test_each_step_fills_exactly_its_number_of_positions(steps):
    history = []
    model = Denoiser(6)
    sample_confidence(
        model, (3, D), mask_id=MASK, steps=steps, prompt=prompts(3, 4), seed=1,
        temperature=1.0, history=history,
    )  # fmt: skip
    masked = [(state == MASK).sum(1) for state in history]
    counts = torch.stack([a - b for a, b in itertools.pairwise(masked)])
    expected = [10 // steps + (i < 10 % steps) for i in range(steps) if 10 // steps or i < 10]
    assert torch.equal(counts, torch.tensor(expected)[:, None].expand(-1, 3))
    assert len(model.inputs) == len(expected)


def test_only_masked_rows_of_the_current_block_go_through_the_head():
    model = Denoiser(7)
    history = []
    sample_confidence(
        model, (2, D), mask_id=MASK, steps=6, block_length=5, prompt=prompts(2, 4),
        history=history, seed=0,
    )  # fmt: skip
    assert len(model.rows) == 6
    for step, (before, rows) in enumerate(zip(history, model.rows, strict=False)):
        end = 4 + 5 * (step // 3 + 1)
        active = (before == MASK) & (torch.arange(D) < end)
        assert torch.equal(rows, active.flatten().nonzero()[:, 0])


def test_shifted_rows_are_those_of_the_positions_before():
    model = Denoiser(8)
    sample_confidence(model, (2, D), mask_id=MASK, steps=1, shift=True, seed=0)
    place = torch.arange(D)
    expected = (torch.arange(2)[:, None] * D + (place - 1).clamp(min=0)).flatten()
    assert torch.equal(model.rows[0], expected)


def test_guidance_masks_the_prompt_in_the_second_half_of_the_batch():
    model = Denoiser(9)
    prompt = prompts(2, 4)
    sample_confidence(
        model, (2, D), mask_id=MASK, steps=2, prompt=prompt, guidance_scale=2.0, seed=0
    )
    for inputs in model.inputs:
        assert inputs.shape == (4, D)
        assert torch.equal(inputs[:2, :4], prompt)
        assert bool((inputs[2:, :4] == MASK).all())
        assert torch.equal(inputs[:2, 4:], inputs[2:, 4:])


def test_sequences_without_work_are_left_out_of_the_call_on_request():
    prompt = torch.full((3, D), 2)
    prompt[1, 5:8] = MASK
    for active_only, rows in ((True, 1), (False, 3)):
        model = Denoiser(10)
        tokens = sample_confidence(
            model, (3, D), mask_id=MASK, steps=3, prompt=prompt, active_only=active_only
        )
        assert [x.shape[0] for x in model.inputs] == [rows] * 3
        assert bool((tokens[::2] == 2).all())
    model = Denoiser(10)
    full = torch.full((3, D), 2)
    assert torch.equal(sample_confidence(model, (3, D), mask_id=MASK, steps=3, prompt=full), full)
    assert model.inputs == []


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    batch, positions, vocabulary, width = 2, 256, 5003, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    largest = 0
    plain = LinearHead.logits

    def noting(self):
        nonlocal largest
        result = plain(self)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(LinearHead, "logits", noting)
    budget = 64 * vocabulary * 4
    sample_confidence(
        lambda x, t: LinearHead(hidden[: len(x)], weight, budget_bytes=budget),
        (batch, positions),
        mask_id=0,
        steps=2,
        seed=0,
        temperature=0.7,
    )
    assert 0 < largest <= 64 * vocabulary


def test_time_is_the_share_of_masked_positions():
    model = Denoiser(11)
    sample_confidence(model, (1, D), mask_id=MASK, steps=2, prompt=prompts(1, 4), seed=0)
    torch.testing.assert_close(torch.cat(model.times), torch.tensor([10 / 14, 5 / 14]))


# Blocks, thresholds and ends


def test_a_sequence_goes_to_its_next_block_without_waiting_for_others():
    model = Denoiser(12)
    whole = sample_confidence(
        model, (4, D), mask_id=MASK, threshold=0.4, block_length=5, prompt=prompts(4, 4), seed=3,
        temperature=1.0,
    )  # fmt: skip
    for row in range(4):
        alone = sample_confidence(
            model, (1, D), mask_id=MASK, threshold=0.4, block_length=5, seed=3, temperature=1.0,
            prompt=prompts(4, 4)[row : row + 1], first_sequence=row,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize(
    "how",
    [{"steps": 10}, {"steps": 10, "exclude_mask": False}, {"threshold": 0.99},
     {"steps": 10, "rule": "origin"}],
)  # fmt: skip
def test_an_end_of_sequence_ends_the_work_after_its_block(how):
    end = 3

    def model(tokens, t):
        logits = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64)
        logits[..., 1] = 3.0
        logits[:, 6, end] = 9.0
        logits[:, 12, 5] = 9.0
        model.sizes.append(len(tokens))
        return logits

    model.sizes = []
    prompt = torch.full((2, 4), end)  # not an end: it is part of the prompt
    options = {"mask_id": MASK, "block_length": 5, "prompt": prompt, "seed": 0, **how}
    tokens = sample_confidence(model, (2, D), eos_id=end, **options)
    assert torch.equal(tokens[0], torch.tensor([end] * 4 + [1, 1, end, 1, 1] + [end] * 5))
    assert torch.equal(tokens[0], tokens[1])
    stopped = len(model.sizes)
    assert bool((sample_confidence(model, (2, D), **options)[:, 12] == 5).all())
    assert len(model.sizes) - stopped > stopped


def test_an_empty_batch_gives_no_rows():
    model = lambda x, t: torch.zeros(*x.shape, VOCAB)  # noqa: E731
    for how in ({"steps": 3}, {"threshold": 0.5}, {"steps": 3, "rule": "origin"}):
        assert sample_confidence(model, (0, 7), mask_id=MASK, seed=0, **how).shape == (0, 7)


# Randomness


def test_tokens_at_a_temperature_follow_the_softmax():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 1.5
    model = lambda x, t: logits.expand(*x.shape, VOCAB)  # noqa: E731
    tokens = sample_confidence(
        model, (400, 10), mask_id=MASK, steps=5, temperature=0.7, rule="random", seed=0
    )
    probs = logits.clone()
    probs[MASK] = -torch.inf
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB)
    assert_counts_match(counts, (probs / 0.7).softmax(-1))


def test_random_and_origin_fill_positions_in_a_random_order():
    model = lambda x, t: torch.zeros(*x.shape, VOCAB)  # noqa: E731
    for how in ({"rule": "random"}, {"rule": "origin", "t_min": 1e-3}):
        history = []
        sample_confidence(model, (4000, 4), mask_id=MASK, steps=2, seed=1, history=history, **how)
        first = (history[1] != MASK).sum(0)
        share = 0.5 if how["rule"] == "random" else (1 - 1e-3) / 2
        for count in first.tolist():
            assert_frequency(count, 4000, share)
        assert bool((history[-1] != MASK).all())
    together = (history[1] != MASK).sum(1)  # of origin: independent positions
    shares = torch.distributions.Binomial(4, torch.tensor(share)).log_prob(torch.arange(5.0)).exp()
    assert_counts_match(torch.bincount(together, minlength=5), shares)


def test_origin_computes_only_the_rows_that_unmask():
    model = Denoiser(13)
    history = []
    sample_confidence(
        model, (3, D), mask_id=MASK, steps=4, rule="origin", prompt=prompts(3, 4), history=history,
        seed=0,
    )  # fmt: skip
    assert sum(rows.numel() for rows in model.rows) == 30
    for (before, after), rows in zip(itertools.pairwise(history), model.rows, strict=True):
        assert rows.numel() == int((before != after).sum())


def test_a_confidence_temperature_draws_positions_by_their_softmax():
    certain = torch.tensor([0.2, 1.0, 2.0, 3.0])

    def model(tokens, t):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 0] = certain
        return logits

    history = []
    sample_confidence(
        model, (4000, 4), mask_id=MASK, steps=4, seed=2, confidence_temperature=0.3,
        history=history, rule="maskgit_plus",
    )  # fmt: skip
    p = certain.exp() / (certain.exp() + VOCAB - 2)
    q = (p / 0.3).softmax(-1)
    first = (history[1] != MASK).int().argmax(1)
    assert_counts_match(torch.bincount(first, minlength=4), q)
    # Without replacement: the pair of the first two positions.
    second = ((history[2] != MASK) & (history[1] == MASK)).int().argmax(1)
    pairs = torch.bincount(first * 4 + second, minlength=16)
    expected = q[:, None] * q / (1 - q[:, None])
    expected.fill_diagonal_(0)
    assert_counts_match(pairs, expected.flatten())


@pytest.mark.parametrize(
    "how",
    [
        {"steps": 5},
        {"steps": 4, "rule": "origin", "block_length": 5},
        {"steps": 5, "rule": "random"},
        {"factor": 1.5},
        {"steps": 5, "confidence_temperature": 0.5, "rule": "entropy"},
    ],
    ids=stable_id,
)
def test_samples_do_not_depend_on_how_they_are_batched(how):
    model = Denoiser(14)
    prompt = prompts(7, 4)
    options = {"mask_id": MASK, "seed": 9, "latent_dim": 1, "temperature": 0.8, **how}
    whole = sample_confidence(model, (7, D), prompt=prompt, **options)
    parts = [
        sample_confidence(
            model, (b - a, D), first_sequence=a, prompt=prompt[a:b], active_only=False, **options
        )
        for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_samples_are_a_function_of_the_seed():
    model = Denoiser(15)
    draw = lambda **how: sample_confidence(  # noqa: E731
        model, (4, D), mask_id=MASK, steps=3, temperature=1.0, **how
    )
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    first, again = (draw(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_latents_are_fresh_per_step_and_sequence_or_as_passed():
    model = Denoiser(16)
    options = {"mask_id": MASK, "seed": 0, "latent_dim": 2}
    sample_confidence(model, (3, D), steps=4, **options)
    drawn = torch.stack(model.latents)
    assert drawn.shape == (4, 3, 2)
    assert drawn.unique().numel() == 24
    assert bool(((drawn > 0) & (drawn < 1)).all())
    passed = torch.rand(4, 3, 2)
    for latent, expected in ((passed, passed), (passed[0], passed[:1].expand(4, -1, -1))):
        model.latents.clear()
        sample_confidence(model, (3, D), steps=4, latent=latent, **options)
        assert torch.equal(torch.stack(model.latents), expected)
    model.latents.clear()
    by_step = torch.rand(D, 3, 2)
    sample_confidence(model, (3, D), threshold=0.3, latent=by_step, active_only=False, **options)
    assert torch.equal(torch.stack(model.latents), by_step[: len(model.latents)])


def test_a_callback_and_a_history_hear_of_every_step():
    calls, history = [], []
    tokens = sample_confidence(
        Denoiser(17), (2, D), mask_id=MASK, steps=7, seed=0, history=history,
        callback=lambda step, total, x: calls.append((step, total, x)),
    )  # fmt: skip
    assert [call[:2] for call in calls] == [(k, 7) for k in range(1, 8)]
    assert all(torch.equal(a[2], b) for a, b in zip(calls, history[1:], strict=True))
    assert bool((history[0] == MASK).all())
    assert torch.equal(history[-1], tokens)


def test_context_follows_the_sequences():
    def model(tokens, t, label):
        assert len(label) == len(tokens)
        logits = torch.zeros(*tokens.shape, VOCAB)
        return logits.scatter(2, label.view(-1, 1, 1).expand(*tokens.shape, 1), 5.0)

    label = torch.tensor([0, 2, 1])
    prompt = torch.full((3, 2), MASK)
    prompt[0] = 4
    tokens = sample_confidence(
        model, (3, 2), mask_id=MASK, steps=2, prompt=prompt, context={"label": label},
        guidance_scale=1.0,
    )  # fmt: skip
    assert tokens.tolist() == [[4, 4], [2, 2], [1, 1]]


@pytest.mark.gpu
def test_samples_on_a_gpu_are_those_on_the_cpu_and_known_counts_need_no_sync():
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)).double()

    def run(device, before=lambda: None):
        here = table.to(device)

        def model(tokens, t):
            before()
            return here[tokens.roll(1, 1)] * (t.double() + 0.5).view(-1, 1, 1)

        return sample_confidence(
            model, (8, 40), mask_id=MASK, steps=8, block_length=20, seed=1, device=device,
            temperature=0.8,
        )  # fmt: skip

    expected = run("cpu")
    assert torch.equal(run("cuda").cpu(), expected)
    try:
        run("cuda", lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (2,)}, TypeError, r"shape must be \(B, D\)"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float 2.0"),
        ({"steps": None}, ValueError, "steps must be an int without a threshold or a factor"),
        ({"steps": 3, "block_length": 3}, ValueError, "multiple of the number of blocks, 2, got 3"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"block_length": 2.5}, TypeError, "block_length must be an int"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0, got -1"),
        ({"mask_id": 11}, ValueError, r"must be in \[0, V\) = \[0, 11\) of model, got 11"),
        ({"mask_id": 12, "vocab_size": 11}, ValueError, r"mask_id must be in \[0, vocab_size\)"),
        ({"vocab_size": 12}, ValueError, "model must return logits over V = 12 classes"),
        ({"rule": "confidence"}, ValueError, "rule must be one of 'low_confidence', 'random'"),
        ({"schedule": "cosine"}, ValueError, "schedule must be one of 'even', 'ancestral'"),
        ({"t_min": 0.0}, ValueError, r"t_min must be in \(0, 1\), got 0.0"),
        ({"t_min": "a"}, TypeError, "t_min must be a number"),
        ({"threshold": "a", "steps": None}, TypeError, "threshold must be a number"),
        ({"threshold": 0.5, "steps": 6, "block_length": 3}, ValueError, "steps caps a threshold"),
        ({"factor": -1.0, "steps": None}, ValueError, "factor must be finite and at least 0"),
        ({"factor": 1.0}, ValueError, "steps must be None with a factor, got 2"),
        ({"factor": 1.0, "threshold": 0.5}, ValueError, "threshold and factor exclude each other"),
        ({"threshold": 0.5, "rule": "random"}, ValueError, "threshold needs a rule with confiden"),
        ({"factor": 0.5, "rule": "origin"}, ValueError, "factor needs a rule with confidences"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"confidence_temperature": -1.0}, ValueError, "confidence_temperature must be finite"),
        ({"confidence_temperature": 1.0, "rule": "origin"}, ValueError, "needs confidences"),
        ({"guidance_scale": -0.5}, ValueError, "guidance_scale must be finite and at least 0"),
        ({"shift": 1}, TypeError, "shift must be True or False"),
        ({"exclude_mask": None}, TypeError, "exclude_mask must be True or False"),
        ({"exclude_mask": False, "rule": "origin"}, ValueError, "exclude_mask=False needs a rule"),
        ({"active_only": 0}, TypeError, "active_only must be True or False"),
        ({"banned_ids": 3}, TypeError, "banned_ids must be a sequence of ints"),
        ({"banned_ids": [1, -2]}, ValueError, r"banned_ids\[1\] must be at least 0, got -2"),
        ({"banned_ids": [11]}, ValueError, r"banned_ids .* \[0, 11\) of model, got 11"),
        ({"deferred_ids": "ab"}, TypeError, "deferred_ids must be a sequence of ints"),
        ({"deferred_ids": [10]}, ValueError, "deferred_ids must not hold the mask, 10"),
        ({"deferred_ids": [1], "rule": "entropy"}, ValueError, "deferred_ids needs rule="),
        ({"eos_id": -1}, ValueError, "eos_id must be at least 0, got -1"),
        ({"confidence_dtype": torch.int64}, ValueError, "confidence_dtype must be None or one of"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0, got -1"),
        (
            {"latent": torch.zeros(3, 1), "latent_dim": 1},
            ValueError,
            r"latent must have shape \(B, L\) = \(2, 1\) or \(S, B, L\) = \(2, 2, 1\)",
        ),
        ({"prompt": torch.zeros(2, 6).long()}, ValueError, "longer than the sequence, D = 5"),
        ({"prompt": torch.tensor([0, 11])}, ValueError, r"prompt must hold .* of model, got 11"),
        ({"prompt": torch.tensor([0, -1])}, ValueError, r"prompt must hold .* \[0, V\), got -1"),
        ({"context": {"a": torch.zeros(3)}}, ValueError, r"context\['a'\] must have B = 2"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator or None"),
        ({"first_sequence": -1}, ValueError, "first_sequence must be at least 0, got -1"),
        ({"callback": 1}, TypeError, "callback must be callable"),
        ({"history": ()}, TypeError, "history must be a list to fill or None"),
        ({"model": 3}, TypeError, "model must be callable, got int"),
        ({"model": lambda x, t: torch.zeros(2, 4, 11)}, ValueError, "model must return logits of"),
        ({"model": lambda x, t: torch.full((2, 5, 11), torch.nan)}, ValueError, "must not hold"),
    ],
    ids=stable_id,
)  # fmt: skip
def test_what_is_wrong_is_named(changes, error, message):
    arguments = {
        "model": lambda x, t: torch.zeros(*x.shape, VOCAB),
        "shape": (2, 5),
        "mask_id": MASK,
        "steps": 2,
        **changes,
    }
    with pytest.raises(error, match=message):
        sample_confidence(**arguments)
