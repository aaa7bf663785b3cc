"""TSV-Merge: task singular vectors, decorrelated (Gargiulo et al., 2025)."""

from functools import partial

from mergekit_cl.merge_methods._matrices import Matrix, TaskMatrices, decorrelated, first, per_matrix, singular
from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import PerMatrix, Scope


@method(paper="https://arxiv.org/abs/2412.00081", base="required")
def tsv_m(scope: Scope, *, rank_share: Fraction = 1.0, lambda_: float = 1.0) -> PerMatrix:
    """Keep each task matrix's largest singular vectors, make those of all tasks orthogonal to each other, add the tasks up.

    Formula:
        u_k, s_k, v_k = the first r singular vectors and values of x_k - base,  r = max(1, int(rank_share * min(m, n) / K))
        U, S, V = the u_k, s_k and v_k of all K models, side by side
        out = base + lambda_ * orthogonal(U) * diag(S) * orthogonal(V)^T,  orthogonal(A) = A (A^T A)^(-1/2)

    A task matrix is ``model - base`` of a tensor of two dimensions, embeddings among them. Other tensors get ``lambda_`` times
    the mean of their task vectors, as in the authors' code; so does a matrix named ``text_projection`` there, but not here.

    Singular vectors that are equal in several models count as one and keep its singular value: K equal models return the
    first r directions of their task matrix. Singular values that are zero, to rounding (4e-6 of the largest for float32), take
    no part; in the authors' code they take part with arbitrary directions. With more models than min(m, n) each keeps one
    direction, where that code keeps none. All is computed in float64. The order of the models has no part in the result.

    When to use:
        To merge models that were fine-tuned for different tasks, with nothing to tune and no data, at the cost of a singular
        value decomposition of each matrix of each model. For few models, or where that takes too long, `task_arithmetic` and
        `ties` need no decomposition; `iso_cts` does better in its paper, with a lambda_ that is tuned.

    Args:
        rank_share: How many directions are kept of all models together, as a share of the min(m, n) that a matrix has. The
            paper uses 1: each model keeps a K-th of them.
        lambda_: Multiplies the sum; the paper's alpha, and 1 there.

    Raises:
        MergeError: The singular values of a matrix were not found.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([[3, 0], [0, 1]]), np.float32([[1, 0], [0, 4]])]  # r is 1: of each, the larger diagonal entry
    >>> merge(models, method="tsv_m", base=np.zeros((2, 2), np.float32))
    array([[3., 0.],
           [0., 4.]], dtype=float32)
    """
    return per_matrix(partial(_decorrelated_sum, rank_share=rank_share), scope.models, lambda_)


def _decorrelated_sum(tasks: TaskMatrices, rank_share: float) -> Matrix:
    kept = max(1, int(rank_share * tasks.directions / len(tasks)))
    u, s, v = decorrelated([first(kept, singular(task, tasks.zero)) for task in tasks], tasks.zero)
    return u * s @ v
