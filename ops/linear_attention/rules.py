"""How linear attention weighs tokens: small values that say which rule, with the numbers it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class MeanSubtraction:
    """Scores minus their mean, plus one for all tokens: weights sum to one, and may be negative.

    For queries q_i and N keys k_j, with the means k̄ and v̄ over tokens and s = `scale`,

        weight of j for i = s/N (q_i . k_j) - s/N sum over j of (q_i . k_j) + 1/N
        out_i = s/N q_i (sum over j of k_j v_j^T) + (1 - s q_i . k̄) v̄

    There is no feature map: queries and keys may be of any sign. From "Bridging the Divide: Reconsidering Softmax and
    Linear Attention" (arXiv 2412.06590), which calls it injective: queries that differ give weights that differ.

    Attributes:
        scale: Factor of scores, d ** -0.5 for heads of d channels unless given.
    """

    scale: float | None = None


@dataclass(frozen=True)
class KernelSum:
    """Scores of queries and keys through ReLU, over their sum.

        out_i = q_i (sum over j of k_j v_j^T) / D_i,    q and k after ReLU,    Σ_i = q_i . (sum over j of k_j)
        D_i = Σ_i + `epsilon`, or the larger of Σ_i and `floor` where that is given

    The first as in "SLAB: Efficient Transformers with Simplified Linear Attention" (arXiv 2405.11582); the second,
    which keeps small sums from blowing up, as in "The Linear Attention Resurrection in Vision Transformer"
    (arXiv 2501.16182), with a floor of 100.

    Attributes:
        epsilon: Added to the sum; without meaning where there is a floor.
        floor: Least denominator.

    Raises:
        ValueError: A number is not positive: queries without a positive channel would divide by zero.
    """

    epsilon: float = 1e-6
    floor: float | None = None

    def __post_init__(self) -> None:
        _check_positive("epsilon", self.epsilon)
        if self.floor is not None:
            _check_positive("floor", self.floor)


@dataclass(frozen=True)
class FlowConservation:
    """A flow from keys to queries: what leaves a key adds up to one, as does what reaches a query.

    With q and k after a sigmoid, q' = q + ε, k' = k + ε and ε = `epsilon`, for N tokens,

        I_i = 1 / (q'_i . (sum over j of k_j + ε) + ε)          O_j = 1 / (k'_j . (sum over i of q_i + ε) + ε)
        A_i = sigmoid(q'_i . (sum over j of k_j O_j + ε) + ε)   c_j = k'_j . (sum over i of q_i I_i + ε) + ε
        W_j = N softmax over j of (c_j clamped to -1 ... 1)      out_i = A_i I_i q_i (sum over j of k_j W_j v_j^T)

    where adding ε to a vector adds it to each channel. The non-causal flow attention of "Flowformer: Linearizing
    Transformers with Conservation Flows" (arXiv 2202.06258), in the form of its vision model.

    Attributes:
        epsilon: Keeps what is divided by from being zero.

    Raises:
        ValueError: `epsilon` is not positive.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive("epsilon", self.epsilon)


Rule: TypeAlias = MeanSubtraction | KernelSum | FlowConservation


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}; 1e-6 is usual, for a floor 100")
