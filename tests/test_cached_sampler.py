"""Windows of the confidence sampler: tokens as by a loop that keeps nothing, calls, refusals."""

from __future__ import annotations

import pytest
import torch
from cached_models import Attention, Cached, Frozen, compiled
from confidence_cases import naive
from naming import stable_id
from sampler_cases import MASK, prompts
from torch import Tensor
from wrong_arguments import Wrong, wrong

from di4c_fast.samplers import sample_confidence, sample_masked
from di4c_fast.samplers.caches import KeyValues, Window

D, P, LENGTH = 20, 8, 4
WINDOWS = ("suffix", "block", "causal")


def fill(model: Cached, batch: int = 3, prompt: Tensor | None = None, **how) -> Tensor:
    prompt = prompts(batch, P) if prompt is None else prompt
    given = {"mask_id": MASK, "seed": 0, "prompt": prompt, "block_length": LENGTH}
    return sample_confidence(model, (len(prompt), D), **{**given, **how})


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 6},
        {"steps": 12, "rule": "entropy"},
        {"steps": 3},
        {"steps": 9, "schedule": "ancestral", "rule": "topk_margin"},
        {"threshold": 0.7},
        {"threshold": 0.5, "rule": "maskgit_plus", "banned": (2, 5)},
        {"factor": 1.2},
        {"steps": 4, "block_length": 8},
        {"steps": 6, "guidance_scale": 1.3},
        {"steps": 6, "schedule": "ancestral", "shift": True},
        {"steps": 9, "schedule": "ancestral", "shift": True, "lead": True},
        {"threshold": 0.3, "shift": True, "lead": True},
        {"steps": None, "threshold": 0.4, "block_length": 5},
    ],
    ids=stable_id,
)
def test_tokens_are_those_of_a_loop_that_computes_everything_anew(window, how):
    length = how.get("block_length", LENGTH)
    if window == "causal" and ("guidance_scale" in how or "shift" in how or length != LENGTH):
        pytest.skip("refused")
    before = int(how.get("shift", False) and not how.get("lead", False))
    how = dict(how)
    banned = {"banned_ids": how.pop("banned")} if "banned" in how else {}
    plain = {key: value for key, value in how.items() if key != "lead"}
    changed = 0
    for seed in range(2):
        model, prompt = Attention(seed), prompts(3, P, seed)
        ours = fill(Cached(model, length), prompt=prompt, window=window, **how, **banned)
        for row, tokens in zip(prompt, ours, strict=True):
            own, other = (Frozen(model, window, P, length, before) for _ in range(2))
            given = {"block_length": LENGTH, "banned": tuple(*banned.values()), **how}
            expected, _ = naive(own, row, size=D, other=other, **given)
            assert torch.equal(tokens, expected)
        changed += int((ours != fill(without_cache(model), prompt=prompt, **plain, **banned)).sum())
    assert bool(changed) or how == {"steps": 3}  # a block's only call is on all positions


def without_cache(model: Attention):
    return lambda tokens, t: torch.stack([model.logits(row) for row in tokens])


def test_a_call_has_the_windows_positions_and_the_sequences_that_have_masks():
    for window, stop in (("suffix", D), ("block", None), ("causal", None)):
        model = Cached(Attention(), LENGTH)
        history: list[Tensor] = []
        fill(model, window=window, threshold=0.3, history=history)
        begins = [w.begin for _, w in model.calls]
        assert sorted(set(begins)) == [8, 12, 16]
        assert begins == sorted(begins)
        for i, (tokens, w) in enumerate(model.calls):
            first = window != "causal" and (not i or begins[i - 1] != w.begin)
            end = w.begin + LENGTH
            assert w.first == first
            assert (w.kind, w.end, w.length, w.batch) == (window, end, D, 3)
            assert (w.start, w.stop) == ((0, D) if first else (w.begin, stop or end))
            inside = history[i][:, w.begin : end] == MASK
            some = torch.arange(3) if w.sequences is None else w.sequences
            assert some.tolist() == inside.any(1).nonzero()[:, 0].tolist()
            assert torch.equal(tokens, history[i][some, w.start : w.stop])
        assert {w.rows for _, w in model.calls} > {3}
        commits = [(w.start, w.stop, w.first, tokens.tolist()) for tokens, w in model.commits]
        if window == "causal":  # each once, when it is filled
            stored = history[-1][:, :16]
            expected = [(0, 8, True), (8, 12, False), (12, 16, False)]
            assert commits == [(*e, stored[:, e[0] : e[1]].tolist()) for e in expected]
        else:
            assert not commits


def test_the_order_drawn_in_advance_and_ends_of_sequences_know_windows():
    prompt = prompts(4, P)
    for window in WINDOWS:
        for how in (
            {"rule": "origin", "steps": 9},
            {"rule": "origin", "steps": 30},
            {"threshold": 0.3, "eos_id": 2},
            {"steps": 12, "eos_id": 2},
            {"steps": 9, "exclude_mask": False},
            {"factor": 2.0, "exclude_mask": False},
        ):
            how |= {"window": window, "temperature": 1.0}
            model = Cached(Attention(3, mask_bias=4.0), LENGTH)
            whole = fill(model, prompt=prompt, **how)
            assert bool((whole != MASK).all()) == how.get("exclude_mask", True)
            alone = [
                fill(model, prompt=prompt[i : i + 1], first_sequence=i, **how) for i in range(4)
            ]
            assert torch.equal(whole, torch.cat(alone))
            every = fill(model, prompt=prompt, active_only=False, **how)
            assert torch.equal(whole, every)


@pytest.mark.parametrize("window", WINDOWS)
def test_lambda_is_one_in_a_block(window):
    model = Cached(Attention(1), LENGTH)
    tokens = fill(model, window=window, steps=9, latent_dim=1, latent_every="block")
    found = latents_of(model)
    latent = torch.tensor([[[found[b, i]] for i in range(3)] for b in (8, 12, 16)])
    given = latent.repeat_interleave(3, 0)  # by step
    how = {"window": window, "steps": 9, "latent_dim": 1}
    assert torch.equal(tokens, fill(model, latent=given, latent_every="block", **how))
    one = fill(model, latent=latent[0], **how)
    assert torch.equal(
        one, fill(model, latent=latent[:1].expand(9, 3, 1), latent_every="block", **how)
    )
    assert not torch.equal(tokens, one)


@pytest.mark.parametrize("known", [1, 8, 10])
def test_ancestral_blocks_see_what_is_committed_once(known):
    prompt, how = prompts(3, known), {"mask_id": MASK, "steps": 3, "block_length": LENGTH}
    for seed in range(3):
        inner = Attention(seed)
        model, history, steps = Cached(inner, LENGTH), list[Tensor](), list[int]()
        how |= {"seed": seed, "prompt": prompt, "latent_dim": 0}
        callback = lambda step, total, tokens: steps.append(total)  # noqa: B023, E731
        tokens = sample_masked(
            model, (3, D), window="causal", history=history, callback=callback, **how
        )
        anew = lambda x, t: torch.stack([inner.block_causal(row, LENGTH) for row in x])  # noqa: B023, E731
        assert torch.equal(tokens, sample_masked(anew, (3, D), **how))
        assert bool((tokens != MASK).all())
        assert steps == [5 * 4] * 20
        begins = [w.begin for _, w in model.calls]
        assert begins == sorted(begins)
        assert set(begins) <= {0, 4, 8, 12, 16}
        assert all((w.start, w.stop, w.rows) == (w.begin, w.end, len(x)) for x, w in model.calls)
        bounds = [(w.start, w.stop) for _, w in model.commits]
        assert [a for a, _ in bounds] == [0, *(b for _, b in bounds)][: len(bounds)]
        for x, w in model.commits:
            assert torch.equal(x, tokens[:, w.start : w.stop])
        for state in history:  # one block after another
            left = (state == MASK).view(3, 5, LENGTH).any(2).any(0).nonzero()[:, 0].tolist()
            assert left == list(range(5 - len(left), 5))
    model = Cached(inner, LENGTH)
    more = {"latent_dim": 1, "latent_every": "block", "window": "causal"}
    sample_masked(model, (3, D), **{**how, **more})
    latents_of(model)


def test_first_hits_in_blocks_see_what_is_committed():
    inner = Attention(0)
    how = {"mask_id": MASK, "first_hitting": True, "block_length": LENGTH, "prompt": prompts(3, 10)}
    model = Cached(inner, LENGTH)
    tokens = sample_masked(model, (3, D), window="causal", seed=1, **how)
    anew = lambda x, t: torch.stack([inner.block_causal(row, LENGTH) for row in x])  # noqa: E731
    assert torch.equal(tokens, sample_masked(anew, (3, D), seed=1, **how))
    assert len(model.calls) == D - 10


def latents_of(model: Cached) -> dict[tuple[int, int], float]:
    """λ by (begin of the block, sequence): one in a block, all others different."""
    found: dict[tuple[int, int], float] = {}
    for latent, (_, w) in zip(model.latents, model.calls, strict=True):
        some = range(w.batch) if w.sequences is None else w.sequences.tolist()
        for i, value in zip(some, latent[:, 0].tolist(), strict=True):
            assert found.setdefault((w.begin, i), value) == value
    assert len(set(found.values())) == len(found)
    return found


@wrong(
    [
        ({"window": "suffix"}, "window must be one of 'all', 'causal', got 'suffix'"),
        ({"model": print, "window": "causal"}, "window='causal' needs a model with a cache for it"),
        ({"block_length": 3}, "block_length must be that of the model, 4, got 3"),
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"shape": (3, 18)}, "D must be a multiple of the model's blocks of 4, got 18"),
        ({"latent_dim": 1}, "window='causal' needs one λ for a block"),
        ({"project_fn": lambda x: x}, "project_fn needs a single block, got blocks of 4"),
    ]
)  # fmt: skip
def test_what_ancestral_blocks_cannot_do_is_refused(wrong: Wrong):
    model = Cached(Attention(), LENGTH)
    given = {"model": model, "shape": (3, D), "mask_id": MASK, "steps": 2, "window": "causal"}
    given |= {"block_length": LENGTH, **wrong.what}
    with wrong.raises():
        sample_masked(given.pop("model"), given.pop("shape"), **given)
    assert not model.calls


class Plain(torch.nn.Module):
    def forward(self, tokens, t):
        raise AssertionError


@wrong(
    [
        ({"model": Plain()}, "window='block' needs a model with a cache for it, ... with none"),
        ({"window": "prefix"}, "window must be one of 'all', 'suffix', 'block', 'causal', got"),
        ({"model": compiled(Plain())}, "needs a model that is not compiled, got one"),
        ({"latent_dim": 1}, "window='block' needs one λ for a block: latent (B, L), or"),
        ({"latent_dim": 1, "latent": torch.rand(3, 3, 1)}, "needs one λ for a block"),
        ({"latent_every": "run"}, "latent_every must be one of 'step', 'block', got 'run'"),
        (
            {"window": "all", "model": Plain(), "threshold": 0.5, "steps": None,
             "latent_every": "block"},
            "latent_every='block' with a threshold needs a window other than 'all'",
        ),
        ({"lead": 1}, TypeError, "lead must be True or False"),
        ({"lead": True}, "lead needs schedule='ancestral', a threshold or a factor"),
        ({"lead": True, "window": "all", "model": Plain()}, "lead needs a window other than 'all'"),
        ({"lead": True, "rule": "origin"}, "lead needs a rule with counts, got origin"),
        ({"lead": True, "schedule": "ancestral"}, "steps must be at least 2 per block with lead"),
        ({"prompt": torch.tensor([0] * 7 + [MASK])}, "prompt must have no unknown tokens"),
        ({"window": "causal", "shift": True}, "shift needs the row before a block, which is comm"),
        ({"window": "causal", "guidance_scale": 1.0}, "guidance_scale needs a cache of its own"),
        ({"window": "causal", "block_length": 6}, "block_length must be that of the model, 4, got"),
        ({"window": "causal", "prompt": torch.ones(6).long()}, "prompt must hold whole blocks"),
        ({"window": "causal", "shape": (3, 18)}, "D must be a multiple of the model's blocks of 4"),
    ]
)  # fmt: skip
def test_what_a_cache_cannot_do_is_refused_before_any_call(wrong: Wrong):
    model = Cached(Attention(), LENGTH)
    arguments = {
        "model": model, "shape": (3, D), "mask_id": MASK, "steps": 3, "block_length": LENGTH,
        "prompt": prompts(3, P), "window": "block", **wrong.what,
    }  # fmt: skip
    if arguments["shape"] == (3, 18) or arguments["block_length"] == 6:
        arguments["steps"] = 6
    with wrong.raises():
        sample_confidence(arguments.pop("model"), arguments.pop("shape"), **arguments)
    assert not model.calls
    assert not model.commits


def window(**changes) -> Window:
    given = {"kind": "block", "begin": 4, "end": 8, "start": 4, "stop": 8, "first": False}
    return Window(**{**given, "length": D, "batch": 4, **changes})


def test_keys_are_those_of_the_sequences_asked_for():
    kept, values = KeyValues(), torch.arange(8.0).view(4, 2)
    ids = lambda *numbers: torch.tensor(numbers)  # noqa: E731
    kept.store([values, -values], window())
    assert torch.equal(kept.rows(window())[1], -values)
    assert torch.equal(kept.rows(window(sequences=ids(0, 1, 3)))[0], values[[0, 1, 3]])
    assert torch.equal(kept.rows(window(sequences=ids(1, 3)))[0], values[[1, 3]])
    kept.store([values[:2]], window(sequences=ids(0, 2)))
    assert torch.equal(kept.rows(window(sequences=ids(2)))[0], values[1:2])
    kept.store([values], window(kind="causal", start=0, stop=4))
    for some in ([0, 2], [1], [0, 1, 2]):  # they come back at the next block
        found = kept.rows(window(kind="causal", sequences=torch.tensor(some)))
        assert torch.equal(found[0], values[some])


@wrong(
    [
        ({"batch": 5}, "window must be that of the cache, ... = (4, 20, 4), got (5, 20, 4)"),
        ({"length": 21}, "window must be that of the cache, ... got (4, 21, 4): a model"),
        ({"begin": 8}, "begin of its block) = (4, 20, 4), got (4, 20, 8)"),
        ({"sequences": torch.tensor([0, 1, 2, 3, 4])}, "of sequences in the cache, 3, got 5"),
        ({"sequences": torch.tensor([1, 3])}, "window must be of sequences in the cache"),
        ({"kind": "causal", "start": 12}, "stop of what was committed) = ..., got (4, 20, 12)"),
    ]
)  # fmt: skip
def test_a_cache_of_something_else_is_named(wrong: Wrong):
    kept = KeyValues()
    with pytest.raises(ValueError, match=r"got \(4, 20, 4\): a model serves one run"):
        kept.rows(window())
    kept.store([torch.zeros(3, 1)], window(sequences=torch.tensor([0, 1, 2])))
    with wrong.raises():
        kept.rows(window(**wrong.what))
    with pytest.raises(ValueError, match="tensors must have R = 4 as their first size, got"):
        kept.store([torch.zeros(3, 1)], window())
