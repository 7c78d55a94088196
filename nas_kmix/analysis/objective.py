"""A loss as a function of all parameters at once: its value, its gradient, Hessian products and random directions.

In:  a classifier and labelled images, or any function of named tensors that is a sum over chunks of data.
Out: numbers and flat vectors (P,), P the number of parameters. Memory grows with a chunk, not with the data, and the
     module that was handed in is never changed: its parameters are replaced from outside.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nas_kmix.engine.data import ImageData

Parameters = Mapping[str, Tensor]
LANCZOS_VECTORS = 20  # scipy's own choice for few eigenpairs; with the default tolerance two restarts are typical


class Objective:
    """`share(parameters, chunk)`, a scalar, summed over `chunks`, as a function of one flat vector (P,)."""

    def __init__(self, share: Callable[[Parameters, Any], Tensor], parameters: Parameters, chunks: Sequence[Any]):
        self._share, self._chunks = share, chunks
        self._shapes = {name: tensor.shape for name, tensor in parameters.items()}
        self.centre = torch.cat([tensor.detach().reshape(-1) for tensor in parameters.values()])
        """Where the parameters are, (P,)."""

    def unravel(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector as named tensors, views of it."""
        pieces = vector.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    @torch.no_grad()
    def value(self, at: Tensor) -> float:
        """The loss at the parameters `at` (P,)."""
        return sum(self._share(self.unravel(at), chunk).item() for chunk in self._chunks)

    def gradient(self, at: Tensor) -> Tensor:
        """(P,), at the parameters `at` (P,)."""
        at = at.detach().requires_grad_()
        total = torch.zeros_like(at, requires_grad=False)
        for chunk in self._chunks:
            total += torch.autograd.grad(self._share(self.unravel(at), chunk), at)[0]
        return total

    def hessian_product(self, at: Tensor, vector: Tensor) -> Tensor:
        """The Hessian at `at` (P,) times `vector` (P,): the derivative of the gradient along it (Pearlmutter 1994)."""
        at = at.detach().requires_grad_()
        total = torch.zeros_like(at, requires_grad=False)
        for chunk in self._chunks:
            (gradient,) = torch.autograd.grad(self._share(self.unravel(at), chunk), at, create_graph=True)
            total += torch.autograd.grad(gradient, at, grad_outputs=vector)[0]
        return total


def cross_entropy_objective(model: nn.Module, data: ImageData, indices: np.ndarray, *, chunk_size: int) -> Objective:
    """The mean cross-entropy in nats of `model` in evaluation mode on these images, normalised as `data` says.

    Images are read once and kept as uint8; `chunk_size` of them at a time pass through the network. Computes in the
    precision of the parameters.
    """
    model = copy.deepcopy(model).eval()
    batches = list(data.batches(np.array_split(indices, math.ceil(len(indices) / chunk_size))))
    images, labels = (torch.cat([batch[i] for batch in batches if len(batch.indices)]) for i in (0, 1))
    parameters = dict(model.named_parameters())
    dtype = next(iter(parameters.values())).dtype

    def share(parameters: Parameters, chunk: slice) -> Tensor:
        logits = functional_call(model, dict(parameters), (data.normalise(images[chunk]).to(dtype),))
        return F.cross_entropy(logits, labels[chunk], reduction="sum") / len(labels)

    chunks = [slice(start, start + chunk_size) for start in range(0, len(labels), chunk_size)]
    return Objective(share, parameters, chunks)


def top_eigenpairs(
    objective: Objective,
    count: int = 2,
    *,
    rng: np.random.Generator,
    tolerance: float = 1e-3,
    restarts: int = 50,
    on_product: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of the Hessian at the centre, and their eigenvectors, by the Lanczos method.

    Args:
        count: of pairs, at least 1 and fewer than there are parameters.
        rng: draws the first vector.
        tolerance: of the eigenvalues, relative; 0 is working precision, which float32 networks do not reach.
        restarts: of the method, after which it gives up.
        on_product: called after each Hessian product; there are at least LANCZOS_VECTORS.

    Returns:
        values (count,), descending, and vectors (count, P), of unit norm, the largest entry of each positive; float64.

    Raises:
        ValueError: it did not converge.
    """
    size = len(objective.centre)

    def product(vector: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(vector.reshape(-1)).to(objective.centre.dtype).to(objective.centre.device)
        result = objective.hessian_product(objective.centre, direction)
        on_product()
        return result.cpu().numpy().astype(np.float64)

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        values, vectors = eigsh(
            operator,
            k=count,
            which="LA",
            v0=rng.standard_normal(size),
            ncv=min(size, max(LANCZOS_VECTORS, 2 * count + 1)),
            tol=tolerance,
            maxiter=restarts,
        )
    except ArpackNoConvergence as error:
        raise ValueError(
            f"The top {count} eigenvalues did not converge in {restarts} restarts; raise --tolerance {tolerance}, or "
            f"take more --images."
        ) from error
    order = np.argsort(-values)
    vectors = vectors.T[order]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    return values[order], vectors * np.sign(largest)


def filter_normalised_direction(parameters: Parameters, *, rng: np.random.Generator) -> Tensor:
    """A Gaussian direction (P,) in which each filter has the norm of the network's own (Li et al. 2018, section 4).

    Filters are slices along the first axis, also in linear layers; biases and BatchNorm's scales and shifts do not
    move.
    """
    pieces = []
    for tensor in parameters.values():
        if tensor.ndim < 2:
            pieces.append(torch.zeros_like(tensor).reshape(-1))
            continue
        drawn = torch.from_numpy(rng.standard_normal(tensor.shape)).to(tensor)
        lengths, wanted = drawn.flatten(1).norm(dim=1), tensor.flatten(1).norm(dim=1)
        pieces.append((drawn.flatten(1) * (wanted / lengths)[:, None]).reshape(-1))
    return torch.cat(pieces)
