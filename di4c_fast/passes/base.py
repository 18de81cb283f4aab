"""What the passes of a backend are given and what they leave.

Shapes: B examples, N components of the student, M of the teacher, K consistency draws, D positions,
V classes, J target rows (x0, then the K draws), A = B·D positions, P slots of a chunk, C components
of the operand at hand. The *work dtype* is fp32, or fp64 for fp64 logits.

A backend is a module of this package with these functions, all on one chunk of positions and all
components at once. The driver calls them; nothing else does.

    forward(chunk)
        Fill the statistics of the visited slots: the sums of every row, the log-probabilities of
        the targets and, as far as `mixture` asks, R_n, the divergences and the rows of q.
    backward(chunk, factors, gradient)
        Write dL/dz of the visited slots (the equation stands at `Factors`).
    clear(gradient, visit)
        Write zeros as dL/dz of the visited slots, faster than indexing does; optional.
    draw(x, y, visit, keys, options)
        A token and statistics for every row of the visited slots: see `di4c_fast.draw`.
    joint(swept, out)
    factors(swept, joint, rows, loss)
        The values of a problem and the factors of its gradient, in fewer and faster steps than
        `joint_terms` and `factors` of `loss.joint`; optional, both or none.
    order(active)
        The active positions first, and how many: `order_positions` of `loss.plan` for up to ORDERS
        positions; optional.
    DRAWS_TARGETS
        The largest vocabulary of which `forward` draws target rows; optional.
    READS_BINS
        The most bins of an operand that stands for a `LogisticHead` by its two numbers per row; 0
        if there is none: then the head computes its logits.

Logits are computed with in the work dtype whatever their own.

The rules that all passes share. A row without any class (all -inf) has total 0 and probability 0
everywhere; NaN and +inf give NaN, never something finite. A position that the student leaves
without any class counts as if q were 0 there. KL terms are +inf where q > 0 = m, and such a column
has no gradient. Column `mask_id` is excluded everywhere and gets gradient 0.

Logits may be a shard of the columns of a vocabulary; tokens are then columns of it. V stands for a
token of another shard, whose `log_prob` may be anything, and -1 in `xu` for the mask of another.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import all_sum

PADDING = 64  # elements: rows of our own buffers start at multiples of it


def padded(vocabulary: int) -> int:
    """The row stride of a buffer of logits: wide loads, and fast matrix products.

    >>> padded(50258)
    50304
    """
    return (vocabulary + PADDING - 1) // PADDING * PADDING


@dataclasses.dataclass(frozen=True)
class Bins:
    """What makes an `Operand` one of `LogisticHead`, beside mu."""

    log_scale: Tensor  # laid out like mu
    eps: float
    clamp: str


@dataclasses.dataclass(frozen=True)
class Operand:
    """Logits of C components in memory, addressed by slot, example, component and position.

    The row of component c at slot i, which is position d of example b, starts at element
    `i·strides[0] + b·strides[1] + c·strides[2] + d·strides[3]` of `logits`, and its V elements are
    neighbours. Logits of all positions have strides[0] = 0, those of one chunk strides[1] =
    strides[3] = 0.

    With `bins` that element is mu of the row, in fp32: only for passes with READS_BINS. The
    gradient of such an operand has the same form.
    """

    logits: Tensor
    strides: tuple[int, int, int, int]
    components: int
    vocabulary: int
    bins: Bins | None = None

    @classmethod
    def of_all(cls, logits: Tensor) -> Operand:
        """Logits (B, C, D, V) of any strides but along V."""
        stride_b, stride_c, stride_d, _ = logits.stride()
        return cls(logits, (0, stride_b, stride_c, stride_d), logits.shape[1], logits.shape[3])

    @classmethod
    def of_chunk(cls, logits: Tensor) -> Operand:
        """Logits (P, C, V) of the slots of one chunk; rows may be padded."""
        stride_i, stride_c, _ = logits.stride()
        return cls(logits, (stride_i, 0, stride_c, 0), logits.shape[1], logits.shape[2])

    def like(self, mu: Tensor, log_scale: Tensor) -> Operand:
        """The same with other numbers behind its bins: a gradient."""
        assert self.bins is not None
        bins = dataclasses.replace(self.bins, log_scale=log_scale)
        return dataclasses.replace(self, logits=mu, bins=bins)

    def part(self, begin: int, end: int) -> Operand:
        """Slots begin .. end - 1 of an operand of one chunk."""
        bins = self.bins
        if bins is not None:
            bins = dataclasses.replace(bins, log_scale=bins.log_scale[begin:end])
        return dataclasses.replace(self, logits=self.logits[begin:end], bins=bins)

    def of_visit(self, visit: Visit) -> Tensor:
        """(P, C, V) in their own dtype: a view where there is one, else a copy."""
        stride_i, stride_b, stride_c, stride_d = self.strides
        if stride_b == 0 and stride_d == 0:
            return self.logits.as_strided(
                (visit.slots, self.components, self.vocabulary),
                (stride_i, stride_c, 1),
                self.logits.storage_offset(),
            )
        if visit.rows is None and self.logits.ndim == 4 and self.logits.shape[0] == 1:
            stop = visit.first + visit.slots
            return self.logits[0, :, visit.first : stop].transpose(0, 1)
        b, d = visit.split()
        return self.logits[b, :, d]


@dataclasses.dataclass(frozen=True)
class Visit:
    """The positions of one chunk: slots first .. first + slots - 1 of the list of all positions.

    With `rows` slot s is position rows[s] = b·D + d, active positions first; without, position s.
    With `count` slots from `count` on are not active: a pass leaves their statistics as they are,
    and writes zeros as their gradient. Without it every visited slot is active.
    """

    first: int
    slots: int
    positions: int  # D
    rows: Tensor | None = None  # (A,) int64
    count: Tensor | None = None  # () int64, on the device

    @property
    def part(self) -> slice:
        """The visited slots in a tensor of all slots."""
        return slice(self.first, self.first + self.slots)

    def index(self, device: torch.device | None = None) -> Tensor:
        """Flat position b·D + d of every visited slot: (P,) int64."""
        if self.rows is not None:
            return self.rows[self.part]
        return torch.arange(self.first, self.first + self.slots, device=device)

    def split(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Example and position of every visited slot: (P,) int64 each."""
        index = self.index(device)
        return index // self.positions, index % self.positions


@dataclasses.dataclass(frozen=True)
class RowSums:
    """The two parts of a logsumexp, kept apart: added up they would carry the rounding of large
    logits. Softmax is `exp(logit - shift) / total`."""

    shift: Tensor  # (A, C) the largest logit of the row, 0 for a row without a class
    total: Tensor  # (A, C) sum of exp(logit - shift), 0 for a row without a class


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What the passes know of a problem. All weights are in the work dtype."""

    mask_id: int | None
    xu: Tensor | None  # (B, K, D) int64: one-hot in q_u where it shows a token; see above
    log_weights: Tensor  # (B, N), normalised
    teacher_weight: Tensor  # (B,)
    consistency_weight: Tensor  # (B,)
    marginal: bool  # KL(q_T || m) and KL(q_u || m) are asked for
    component: bool  # KL(q_T || p_n) is asked for
    correlation: bool  # cor(x) of the target rows; False: their negative joint log-likelihood
    data_weight: Tensor | None  # (B,); None: `Values.loss` is not asked for
    component_weight: Tensor | None  # (B,)
    # () int64: `forward` draws the last K target rows from u, behind those that are given,
    # (B, J - K, D) int64. Only for passes with DRAWS_TARGETS, and not in `backward`.
    seed: Tensor | None = None
    given: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the first sweep leaves, by slot, in the work dtype.

    `q` and `q_teacher` hold the slots 0 .. kept - 1 only, with padded rows; a later chunk forms
    its rows again in backward.
    """

    # (B, J, D) int64, the target rows; complete before `forward` of a chunk unless that draws them
    tokens: Tensor
    student: RowSums  # (A, N)
    teacher: RowSums | None  # (A, M)
    consistency: RowSums | None  # (A, K); may be there before `forward` (see `sums_known`)
    log_prob: Tensor  # (A, J, N) of the targets, -inf where impossible
    mass: Tensor  # (A, N)  R_n = sum_v q_v r_nv,  q = teacher_weight q_T + consistency_weight q_u
    teacher_kl: Tensor  # (A,)  KL(q_T || m)
    consistency_kl: Tensor  # (A,)  KL(q_u || m)
    divergence: Tensor  # (A, N)  KL(q_T || p_n)
    q: Tensor  # (kept, padded V)
    q_teacher: Tensor  # (kept, padded V)
    # `draw` has left the row sums of the consistency logits. In `backward` all sums are known, and
    # nothing of the statistics is written.
    sums_known: bool
    # The sums of all rows are there before `forward`: those of a whole vocabulary, of which the
    # logits are a shard. It may leave `log_prob` as it is.
    all_known: bool = False

    def kept(self, rows: Tensor, visit: Visit) -> Tensor | None:
        """The visited slots of `q` or `q_teacher`; None where they are not kept."""
        part = rows[visit.part]
        return part if visit.slots and part.shape[0] == visit.slots else None


class Chunk(NamedTuple):
    """What `forward` and `backward` are given of a chunk of positions."""

    z: Operand  # of the student
    t: Operand | None  # of the teacher, and
    u: Operand | None  # of the consistency logits: None where the pass does not need them
    visit: Visit
    mixture: Mixture
    statistics: Statistics


@dataclasses.dataclass(frozen=True)
class Factors:
    """What `backward` multiplies with, the upstream gradient included. By slot, work dtype.

    dL/dz[n,v] = probability_n p_nv - marginal q_v r_nv - component_n q_T,v
                 + sum_j kappa_jn 1[v = x_j]
    """

    probability: Tensor  # (A, N)
    marginal: Tensor  # (A,)
    component: Tensor  # (A, N)
    kappa: Tensor  # (A, J, N)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where every slot lies, and which slots count.

    Of a packed batch every position is an example of its own, and "example" below is a sequence.
    """

    sizes: tuple[int, int]  # B, D
    rows: Tensor | None  # (A,) int64 position of each slot, active ones first; None: slot s is s
    count: Tensor | None  # () int64, how many are active; None: all slots
    slots: int  # A
    group: str | None = None  # of ranks that have the other positions
    ends: Tensor | None = None  # (S + 1,) cumulative lengths of the sequences of a packed batch
    sequence: Tensor | None = None  # (B,) of each position of it
    number: int | None = None  # how many are active, where the host knows it beside `count`

    def spread(self, values: Tensor) -> Tensor:
        """(B, ...) -> (A, ...): every slot has the values of its example."""
        batch, positions = self.sizes
        if self.sequence is not None:
            return values[self.sequence if self.rows is None else self.sequence[self.rows]]
        if self.rows is None:
            every = values.unsqueeze(1).expand(batch, positions, *values.shape[1:])
            return every.flatten(0, 1).contiguous()
        return values[self.rows // max(positions, 1)]

    def alive(self, total: Tensor) -> Tensor:
        """(A,) active slots at which some row has a class; total (A, N) of the row sums."""
        some = total.sum(-1) != 0  # they are not negative; faster than `any`
        if self.count is None:
            return some
        return some & (torch.arange(self.slots, device=total.device) < self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the positions of every example, in fp64: (A, ...) -> (B, ...).

        Those of all ranks of the group count.
        """
        batch, positions = self.sizes
        if self.rows is not None:  # back into the order of positions, so that sums repeat
            every = values.new_zeros(batch * positions, *values.shape[1:])
            values = every.index_copy_(0, self.rows, values)
        if self.ends is not None:
            wide = values.to(torch.float64)
            return torch.segment_reduce(
                wide, "sum", offsets=self.ends, axis=0, initial=0, unsafe=True
            )
        sums = values.reshape(batch, positions, *values.shape[1:]).sum(1, dtype=torch.float64)
        return sums if self.group is None else all_sum(sums, self.group)


@dataclasses.dataclass(frozen=True)
class Joint:
    """What the joint terms leave for the gradient; zeros where nothing counts."""

    difference: Tensor  # (A, J, N) rho - w
    weights: Tensor  # (B, J, N) w, work dtype
    counted: Tensor  # (B, J) at how many positions the target counts, work dtype


class Swept(NamedTuple):
    """What the first sweep has left of all positions; weights by sequence of a packed batch."""

    statistics: Statistics
    mixture: Mixture
    places: Places


class Values(NamedTuple):
    """What an evaluation gives, in the work dtype, in nats. Differentiable: the first two."""

    rows: Tensor  # (B, J) cor(x) of every target row, or its negative joint log-likelihood
    loss: Tensor  # (B,) the weighted sum of the terms, 0 where it is not asked for
    component: Tensor  # (B,) sum_n e^{a_n} sum_d KL(q_T || p_n)
    teacher_kl: Tensor  # (B,) sum_d KL(q_T || m)
    consistency_kl: Tensor  # (B,) sum_d KL(q_u || m)


@dataclasses.dataclass(frozen=True)
class DrawOptions:
    """What `draw` is asked. The R rows of a visit are ordered by slot, then by component."""

    mask_id: int | None
    seed: int | Tensor  # () int64
    step: int | Tensor = 0  # () int64
    temperature: float | Tensor = 1.0  # or (R,); at 0 the argmax, with statistics at 1
    guidance: float | Tensor = 0.0  # scale, or (R,), of u + (scale + 1) (x - u)
    wanted: frozenset[str] = frozenset()  # of "argmax", "entropy", "margin", "raw_prob"

    @property
    def greedy(self) -> bool:
        """Every row takes its argmax: no random number is needed."""
        return isinstance(self.temperature, float) and self.temperature == 0.0

    @property
    def tempered(self) -> bool:
        """The drawn distribution may differ from the one at temperature 1."""
        return isinstance(self.temperature, Tensor) or self.temperature not in (0.0, 1.0)

    def of_rows(self, rows: slice) -> DrawOptions:
        """The same for some of the rows."""
        temperature, guidance = self.temperature, self.guidance
        if isinstance(temperature, Tensor):
            temperature = temperature[rows]
        if isinstance(guidance, Tensor):
            guidance = guidance[rows]
        return dataclasses.replace(self, temperature=temperature, guidance=guidance)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What `draw` leaves: (R,) each, in the work dtype but for `token` and `argmax`.

    The first three follow the rules of `RowSums`, of logits x / T. The others may be anything where
    the token is -1; those that are not wanted are None.
    """

    token: Tensor  # int64; -1 in a row with NaN, with +inf, or without any class
    shift: Tensor
    total: Tensor
    log_weight: Tensor  # x / T at the token, minus shift
    argmax: Tensor | None = None  # int64, the lowest id among equals
    entropy: Tensor | None = None
    margin: Tensor | None = None  # largest minus second largest probability
    raw_prob: Tensor | None = None  # probability of the token at temperature 1

    @property
    def log_total(self) -> Tensor:
        """logsumexp - shift."""
        return self.total.log()
