"""Device helpers that several kernels share.

Shapes: B batch, N components (of the operand at hand), D positions, V vocabulary, C components of
one tile, W columns of one tile. A *slot* counts the positions that a launch visits; a *position*
is the flat index b·D + d.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of the `KIND` argument: what an operand's pointers mean.
LOGITS = 0  # x is the tensor of logits
LOGISTIC_LEFT = 1  # x is mu, y is log_scale, clamp "left"
LOGISTIC_MIN = 2  # the same with clamp "min"

# Streams of random numbers, as in `rng`.
BLOCKS = tl.constexpr(0)  # one number per block of the vocabulary
TOKENS = tl.constexpr(1)  # one per token


@triton.jit
def position_at(slot, inside, rows_ptr, count_ptr, first, HAS_ROWS: tl.constexpr):
    """Position of a slot (scalar or vector, int64) and whether it is to be worked on."""
    place = first + slot
    if HAS_ROWS:
        position = tl.load(rows_ptr + place, mask=inside, other=0)
        active = inside & (place < tl.load(count_ptr))
    else:
        position = place
        active = inside
    return position, active


@triton.jit
def split_position(position, D):
    """Example and position in it, int64, of b·D + d. Divides in int32, which is far cheaper."""
    small = position.to(tl.int32)
    return (small // D).to(tl.int64), (small % D).to(tl.int64)


@triton.jit
def row_offset(
    slot, position, component, D, stride_i, stride_b, stride_c, stride_d, ALIGN: tl.constexpr
):
    """Element offset of a row. ALIGN divides every stride, and is how wide loads shall be.

    The hint at the end also hides a larger alignment, which would give wider loads than
    `operands.load_align` asks for: 170 instead of 117 registers in mixture forward.
    """
    b, d = split_position(position, D)
    return place_offset(slot, b, component, d, stride_i, stride_b, stride_c, stride_d, ALIGN)


@triton.jit
def place_offset(slot, b, c, d, stride_i, stride_b, stride_c, stride_d, ALIGN: tl.constexpr):
    """`row_offset` where example and position are known apart."""
    offset = (
        slot * (stride_i // ALIGN)
        + b * (stride_b // ALIGN)
        + d * (stride_d // ALIGN)
        + c * (stride_c // ALIGN)
    )
    return tl.multiple_of(offset * ALIGN, ALIGN)


@triton.jit
def logistic_edges(mu, log_scale, cols, V):
    """Scaled edges of the bins, and the scaled width: [C, W], [C, W], [C, 1]."""
    step = 2.0 / V
    inverse = tl.exp(2.0 - log_scale)[:, None]
    left = (cols.to(tl.float32) * step - 1.0)[None, :] - mu[:, None]
    return left * inverse, (left + step) * inverse, step * inverse


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both without cancellation."""
    tail = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + tail)
    small = tail * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def one_minus_exp(width):
    """1 - exp(-width) for width >= 0, without cancellation for small widths."""
    series = width * (1.0 - width * (0.5 - width * (1.0 / 6.0 - width * (1.0 / 24.0))))
    return tl.where(width < 0.03, series, 1.0 - tl.exp(-width))


@triton.jit
def logistic_tile(mu, log_scale, cols, V, eps, KIND: tl.constexpr):
    """Bin logits of discretised logistics, [C] and [C] -> [C, W].

    log(F(right) - F(left)) in the form of the head, with 1 - F(left)/F(right) rewritten as
    sigmoid(-left) (1 - exp(-(right - left))), which does not cancel for narrow bins.
    """
    left, right, width = logistic_edges(mu, log_scale, cols, V)
    return bin_logits(left, right, one_minus_exp(width), eps, KIND)


@triton.jit
def bin_logits(left, right, mass, eps, KIND: tl.constexpr):
    _, above_left = sigmoids(left)
    logits = log_sigmoid(right) + tl.log(eps + above_left * mass)
    if KIND == 2:
        below_right, _ = sigmoids(right)
        upper = log_sigmoid(-left) + tl.log(eps + below_right * mass)
        logits = tl.minimum(logits, upper)
    return logits


@triton.jit
def logistic_slopes(mu, log_scale, cols, V, eps, KIND: tl.constexpr):
    """d logit / d mu and d logit / d log_scale of every bin: [C, W] each."""
    left, right, width = logistic_edges(mu, log_scale, cols, V)
    inverse = tl.exp(2.0 - log_scale)[:, None]
    return bin_slopes(left, right, width, inverse, eps, KIND)


@triton.jit
def slopes_at(mu, log_scale, tokens, V, eps, KIND: tl.constexpr):
    """The same at given tokens: mu and log_scale [N], tokens [J] -> [J, N] each."""
    step = 2.0 / V
    inverse = tl.exp(2.0 - log_scale)[None, :]
    left = (tokens.to(tl.float32) * step - 1.0)[:, None] - mu[None, :]
    right = (left + step) * inverse
    return bin_slopes(left * inverse, right, step * inverse, inverse, eps, KIND)


@triton.jit
def bin_slopes(left, right, width, inverse, eps, KIND: tl.constexpr):
    mass = one_minus_exp(width)
    shrink = width * (1.0 - mass)
    not_above, above = sigmoids(left)
    below, not_below = sigmoids(right)
    lower_total = eps + above * mass
    lower_share = mass * above * not_above / lower_total
    slope_mu = inverse * (lower_share - not_below)
    slope_scale = left * lower_share - right * not_below - shrink * above / lower_total
    if KIND == 2:
        upper_total = eps + below * mass
        upper_share = mass * below * not_below / upper_total
        upper_mu = inverse * (not_above - upper_share)
        upper_scale = left * not_above - right * upper_share - shrink * below / upper_total
        lower = log_sigmoid(right) + tl.log(lower_total)
        upper = log_sigmoid(-left) + tl.log(upper_total)
        # Where both are equal a minimum passes half of the gradient to each.
        part = tl.where(lower < upper, 1.0, tl.where(lower > upper, 0.0, 0.5))
        slope_mu = part * slope_mu + (1.0 - part) * upper_mu
        slope_scale = part * slope_scale + (1.0 - part) * upper_scale
    return slope_mu, slope_scale


@triton.jit
def logits_tile(
    x_ptr,  # logits, or mu
    y_ptr,  # log_scale; not read for KIND 0
    offset,  # [C] int64
    wanted,  # [C] bool, rows to read
    cols,  # [W]
    V,
    mask_id,  # excluded column, -1 for none
    eps,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,  # some columns may lie beyond V
    MASKED: tl.constexpr = True,  # the excluded column may be among cols
):
    """Logits [C, W] in fp32; -inf at excluded columns, beyond V, and in rows not wanted."""
    if KIND == 0:
        keep = wanted[:, None]
        if TAIL:
            keep = keep & (cols < V)[None, :]
        tile = tl.load(x_ptr + offset[:, None] + cols[None, :], mask=keep, other=float("-inf"))
        tile = tile.to(tl.float32)
    else:
        mu = tl.load(x_ptr + offset, mask=wanted, other=0.0).to(tl.float32)
        log_scale = tl.load(y_ptr + offset, mask=wanted, other=0.0).to(tl.float32)
        tile = logistic_tile(mu, log_scale, cols, V, eps, KIND)
        tile = tl.where(wanted[:, None] & (cols < V)[None, :], tile, float("-inf"))
    if MASKED:
        tile = tl.where((cols == mask_id)[None, :], float("-inf"), tile)
    return tile


@triton.jit
def logits_at(x_ptr, y_ptr, offset, tokens, wanted, V, mask_id, eps, KIND: tl.constexpr):
    """Logits at given tokens: offset [C, 1], tokens and wanted broadcast to [C, J] -> [C, J]."""
    wanted = wanted & (tokens != mask_id)
    if KIND == 0:
        picked = tl.load(x_ptr + offset + tokens, mask=wanted, other=float("-inf"))
        picked = picked.to(tl.float32)
    else:
        mu = tl.load(x_ptr + offset, mask=wanted, other=0.0).to(tl.float32)
        log_scale = tl.load(y_ptr + offset, mask=wanted, other=0.0).to(tl.float32)
        inverse = tl.exp(2.0 - log_scale)
        step = 2.0 / V
        left = (tokens.to(tl.float32) * step - 1.0) - mu
        right = (left + step) * inverse
        left = left * inverse
        picked = bin_logits(left, right, one_minus_exp(step * inverse), eps, KIND)
        picked = tl.where(wanted, picked, float("-inf"))
    return picked


@triton.jit
def random_words(seed, step, key, call, STREAM: tl.constexpr):
    """The four Philox words of indices 4·call .. 4·call + 3, in the layout of `rng`: uint32.

    seed and step are scalars, int64; key (int64) and call broadcast against each other.
    """
    zero = (key * 0 + call * 0).to(tl.uint32)
    low = (key & 0xFFFFFFFF).to(tl.uint32) + zero
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    counter = (call + (STREAM << 30)).to(tl.uint32) + zero
    last = (step & 0xFFFFFFFF).to(tl.uint32) + zero
    return tl.philox(seed, counter, low, high, last)


@triton.jit
def word_to_uniform(word):
    """(i + 1/2) 2^-32 of a word i, below 1."""
    number = (word.to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(number, 0.99999994)


@triton.jit
def uniform(seed, step, key, index, STREAM: tl.constexpr):
    """Uniform numbers in (0, 1), a function of (seed, step, row key, stream, index)."""
    w0, w1, w2, w3 = random_words(seed, step, key, index // 4, STREAM)
    which = index % 4
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word_to_uniform(word)


@triton.jit
def uniform_run(seed, step, key, first, STREAM: tl.constexpr, COUNT: tl.constexpr):
    """`uniform` of indices first .. first + COUNT - 1, a quarter of the work: [R, COUNT].

    key and first are [R]; first is a multiple of 4, COUNT a power of two.
    """
    if COUNT < 4:
        number = uniform(seed, step, key[:, None], first[:, None] + tl.arange(0, COUNT), STREAM)
    else:
        call = (first // 4)[:, None] + tl.arange(0, COUNT // 4)[None, :]
        w0, w1, w2, w3 = random_words(seed, step, key[:, None], call, STREAM)
        number = word_to_uniform(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
    return number


@triton.jit
def log_exponential(number):
    """log(-log(1 - u)); small u keep their precision."""
    rest = 1.0 - number
    # log1p(-u) from log: the rounding of 1 - u is divided out.
    gap = 1.0 - rest
    exact = gap > 0.0
    log1p = tl.where(exact, tl.log(rest) * (number / tl.where(exact, gap, 1.0)), -number)
    return tl.log(-log1p)


@triton.jit
def load_logsumexp(ptr, wanted):
    """logsumexp of rows; +inf for rows without any class, so that logit - lse is -inf there."""
    lse = tl.load(ptr, mask=wanted, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def softmax_tile_sum(
    x_ptr,
    y_ptr,
    lse_ptr,
    xu_ptr,
    slot,
    position,
    begin,
    components,
    D,
    cols,
    V,
    mask_id,
    eps,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_XU: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The part of `mean_softmax_tile` of BLOCK_C components, not divided: [W] fp32."""
    c = begin + tl.arange(0, BLOCK_C).to(tl.int64)
    inside = c < components
    hidden = inside
    if HAS_XU:
        b, d = split_position(position, D)
        shown = tl.load(xu_ptr + (b * components + c) * D + d, mask=inside, other=mask_id)
        hidden = inside & (shown == mask_id)
    lse = load_logsumexp(lse_ptr + position * components + c, hidden)
    offset = row_offset(slot, position, c, D, stride_i, stride_b, stride_c, stride_d, ALIGN)
    tile = logits_tile(x_ptr, y_ptr, offset, hidden, cols, V, mask_id, eps, KIND, TAIL)
    prob = tl.exp(tile - lse[:, None])
    if HAS_XU:
        one_hot = (cols[None, :] == shown[:, None]).to(tl.float32)
        prob = tl.where((inside & (shown != mask_id))[:, None], one_hot, prob)
    return tl.sum(prob, axis=0)


@triton.jit
def mean_softmax_tile(
    x_ptr,
    y_ptr,
    lse_ptr,  # [BD, C] fp32
    xu_ptr,  # [B, C, D] int64; read with HAS_XU
    slot,
    position,
    components,
    D,
    cols,  # [W]
    V,
    mask_id,
    eps,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_XU: tl.constexpr,
    TAIL: tl.constexpr,
    SINGLE: tl.constexpr,  # all components in one tile
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Mean over components of softmax, one-hot where xu shows a token: [W] fp32."""
    if SINGLE:  # without a loop, the loop over columns around this can be pipelined
        total = softmax_tile_sum(
            x_ptr, y_ptr, lse_ptr, xu_ptr, slot, position, 0, components, D, cols, V, mask_id, eps,
            stride_i, stride_b, stride_c, stride_d, KIND, ALIGN, HAS_XU, TAIL, BLOCK_C,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_V], tl.float32)
        for begin in range(0, components, BLOCK_C):
            total += softmax_tile_sum(
                x_ptr, y_ptr, lse_ptr, xu_ptr, slot, position, begin, components, D, cols, V,
                mask_id, eps, stride_i, stride_b, stride_c, stride_d, KIND, ALIGN, HAS_XU, TAIL,
                BLOCK_C,
            )  # fmt: skip
    return total / components


@triton.jit
def distribution_tile(
    stored_ptr,  # row of a stored distribution
    t_ptr,  # teacher logits, one component
    ty_ptr,
    t_offset,
    lse_t,  # scalar
    cols,
    V,
    mask_id,
    eps,
    SOURCE: tl.constexpr,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One distribution over the columns of a block, [W] fp32."""
    if SOURCE == 1:
        if TAIL:
            return tl.load(stored_ptr + cols, mask=cols < V, other=0.0)
        return tl.load(stored_ptr + cols)
    row = t_offset + tl.zeros([1], tl.int64)
    tile = logits_tile(t_ptr, ty_ptr, row, row >= 0, cols, V, mask_id, eps, KIND, TAIL)
    return tl.sum(tl.exp(tile - lse_t), axis=0)


@triton.jit
def kappa_tile(
    picked_ptr,  # [BD, J, N] fp32, log-probabilities of the targets
    marginal_ptr,  # [BD, J] fp32, m at the targets
    joint_ptr,  # [B, J, N] fp32, joint weights of the components
    alpha_ptr,  # [B, J] fp32, weights of the target rows
    log_weights,  # [N] fp32
    position,
    b,
    j,  # [BLOCK_J]
    n,  # [BLOCK_N]
    J,
    N,
    CORRELATION: tl.constexpr,
):
    """kappa_jn = alpha_j (rho_jn - w_jn) of one position, [BLOCK_J, BLOCK_N].

    0 where the target is left out because no component can produce it. Without the control
    variate the local responsibility rho is absent.
    """
    inside = (j < J)[:, None] & (n < N)[None, :]
    entry = j[:, None] * N + n[None, :]
    joint = tl.load(joint_ptr + b * J * N + entry, mask=inside, other=0.0)
    alpha = tl.load(alpha_ptr + b * J + j, mask=j < J, other=0.0)[:, None]
    if CORRELATION:
        marginal = tl.load(marginal_ptr + position * J + j, mask=j < J, other=float("-inf"))
        picked = tl.load(picked_ptr + position * J * N + entry, mask=inside, other=float("-inf"))
        counted = (marginal > float("-inf"))[:, None]
        offset = tl.where(counted, marginal[:, None], 0.0)
        local = tl.exp(log_weights[None, :] + picked - offset)
        return tl.where(counted & inside, alpha * (local - joint), 0.0)
    return -alpha * joint


@triton.jit
def kappa_sum(
    picked_ptr,
    marginal_ptr,
    joint_ptr,
    alpha_ptr,
    log_weights,
    position,
    b,
    n,
    J,
    N,
    CORRELATION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum over the targets of kappa, [BLOCK_N]."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(0, J, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)
        kappa = kappa_tile(
            picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, log_weights, position, b, j, n, J, N,
            CORRELATION,
        )  # fmt: skip
        total += tl.sum(kappa, axis=0)
    return total
