"""The partial-channel supernet: every operation of every edge at once, mixed by architecture parameters.

In:  images (N, 3, H, W), float, normalised; H and W divisible by 4 (CIFAR stem) or by 32 (ImageNet stem).
Out: logits (N, num_classes); a `Genotype` once the architecture parameters have been learnt.

The mathematics is PC-DARTS's, which `darts_space.plain` spells out edge by edge. Here a cell is computed state by
state: all edges that leave a state are computed together (`StateEdges`), because they read the same first 1/K of its
channels and nothing else.

- One depthwise convolution serves both kernel sizes on all edges: the 3x3 filters sit in a 5x5 frame of zeros. One
  grouped pointwise convolution and one BatchNorm follow.
- The mixing weights, softmax(alpha) (equation 1) times softmax(beta) (section 3.3), become the scales of the
  BatchNorms, so that the weighted sum over a node's edges is a plain addition.
- A pool with its BatchNorm gives the same tensor on all edges: a matrix of mixing weights distributes it to the nodes.
- The other channels bypass (equation 2): again a matrix, of beta alone. The channel shuffle is the order in which a
  node's channels are written.

Inside a cell tensors are (N, H, W, C), which outside are channels_last. `from_plain` and `to_plain` convert the state
dicts of the two forms into each other.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darts_space.cell import EDGES, PRIMITIVES, STATES, edge_rows
from darts_space.fast import kernels
from darts_space.fast.conversion import from_plain
from darts_space.fast.kernels import average_pool, pointwise_convolution, product, summed
from darts_space.fast.norm import BatchNorm2d, batch_norm
from darts_space.fast.separable import batch_to_space, separable_convolution, space_to_batch
from darts_space.plain import PlainCell
from darts_space.search_network import SearchNetwork

MIXED = tuple(
    map(
        PRIMITIVES.index,
        ("max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    )
)
"""The operations that end in a BatchNorm whatever the stride; the skip connection does so only with stride 2."""
SKIP = PRIMITIVES.index("skip_connect")


class StateEdges(nn.Module):
    """All edges that leave one state (or both input states, S = 2) for the T nodes after it: E = S * T edges.

    (N, H, W, S * C) -> what these edges add to each of the T nodes: the operations to the mixed channels,
    (N, H / stride, W / stride, T * C / K), and bypass and identity to all channels, (N, H / stride, W / stride, T * C).

    Channels are ordered by (kernel size, state, node, channel), where there are several of each.
    """

    joint = False
    """Whether the norms take the batches of all processes for a single one; `join_norms` says so."""

    def __init__(self, states: tuple[int, ...], channels: int, partial: int, stride: int):
        super().__init__()
        e = len(edge_rows(states))
        self.sources, self.targets = len(states), e // len(states)
        self.partial, self.stride = partial, stride
        self.mixed = c = channels // partial
        self.axes = (2, self.sources, self.targets, c)
        # The first axis: the two blocks of the separable convolutions, then the one of the dilated convolutions.
        self.depthwise_3x3 = nn.Parameter(torch.empty(3, e, c, 1, 3, 3))
        self.depthwise_5x5 = nn.Parameter(torch.empty(3, e, c, 1, 5, 5))
        self.pointwise = nn.Parameter(torch.empty(3, 2, e, c, c, 1, 1))  # kernel size 3, 5
        # The first axis: the three blocks with either kernel size; with stride 2 the skip connection.
        rows = 6
        if stride == 2:
            self.skip = nn.Parameter(torch.empty(2, e, c // 2, c, 1, 1))  # of the even pixels, of the odd ones
            rows = 7
        self.register_buffer("running_mean", torch.zeros(rows, e, c))
        self.register_buffer("running_var", torch.ones(rows, e, c))
        self.register_buffer("running_pools_mean", torch.zeros(2, self.sources, c))
        self.register_buffer("running_pools_var", torch.ones(2, self.sources, c))
        for name, pattern in self._patterns().items():
            self.register_buffer(name, pattern.contiguous(), persistent=False)

    def _patterns(self) -> dict[str, Tensor]:
        """Masks of zeros and ones: where the matrices in `forward` have entries."""
        s, c, k = self.sources, self.mixed, self.partial
        patterns = {
            "own_channel": torch.eye(c).view(1, c, 1, c),
            "own_place": torch.eye(k * c).view(k * c, k, c).transpose(1, 2).reshape(k, c, 1, k * c),  # the shuffle
        }
        if self.stride == 2:
            patterns["own_half"] = torch.eye(2 * s).view(2, s, 1, 2, s).permute(0, 1, 2, 4, 3)[..., None, :, None]
        return patterns

    def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`weights` (6 + K, S, T): of the operations `MIXED`, of the skip connection, and K - 1 times of the edge."""
        c, k = self.mixed, self.partial
        states = x.unflatten(3, (self.sources, k * c))
        front = states[..., :c].flatten(3).contiguous()
        pools_weight, *convolutions_weight, bypass_weight = weights.split(
            [2, 2, 2, k] if self.stride == 1 else [2, 2, 2, 1, k - 1]
        )
        separable_scale, dilated_scale, *skip_scale = (
            weight[..., None].expand(*weight.shape, c).flatten() for weight in convolutions_weight
        )
        first, second, dilated = self._depthwise_filters()
        first_pointwise, second_pointwise, dilated_pointwise = self._pointwise_filters()

        planes = front.permute(0, 3, 1, 2)
        pools = torch.cat([F.max_pool2d(planes, 3, self.stride, 1), average_pool(planes, self.stride)], dim=1)
        mean, var = self.running_pools_mean.view(-1), self.running_pools_var.view(-1)
        pools = batch_norm(pools, mean, var, training=self.training, joint=self.joint).permute(0, 2, 3, 1)
        mixed = self._spread(pools, pools_weight.reshape(1, -1, self.targets), self.own_channel)

        front = F.relu(front)
        separable = separable_convolution(front, first, first_pointwise, self.stride, axes=self.axes)
        separable = separable_convolution(self._norm(0, separable, rectified=True), second, second_pointwise)
        mixed = mixed + self._sum(self._norm(2, separable, separable_scale))
        if self.stride == 2:  # every second pixel of every second pixel
            even, odd = _even_and_odd(front)
            every_second = separable_convolution(even, dilated, dilated_pointwise, axes=self.axes)
            mixed = mixed + self._sum(self._norm(4, every_second, dilated_scale))
        elif x.shape[1] % 2 == x.shape[2] % 2 == 0:
            every_second = separable_convolution(space_to_batch(front), dilated, dilated_pointwise, axes=self.axes)
            mixed = mixed + batch_to_space(self._sum(self._norm(4, every_second, dilated_scale)))
        else:
            every_second = separable_convolution(front, dilated, dilated_pointwise, dilation=2, axes=self.axes)
            mixed = mixed + self._sum(self._norm(4, every_second, dilated_scale))

        if self.stride == 1:
            return mixed, self._spread(x, bypass_weight, self.own_place)
        skip = pointwise_convolution(torch.cat([even, odd], dim=3), self._skip_filters())
        mixed = mixed + self._sum(self._norm(6, skip, *skip_scale), kernel_sizes=1)
        if k == 1:
            return mixed, mixed.new_zeros(()).expand_as(mixed)
        behind = F.max_pool2d(states[..., c:].flatten(3).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return mixed, self._spread(behind, bypass_weight, self.own_place[1:])

    def _norm(self, row: int, x: Tensor, scale: Tensor | None = None, rectified: bool = False) -> Tensor:
        """BatchNorm of all edges' channels, whose running statistics start at `row`, and a ReLU if `rectified`."""
        rows = slice(row, row + x.shape[3] // self.running_mean[0].numel())
        mean, var = self.running_mean[rows].view(-1), self.running_var[rows].view(-1)
        y = batch_norm(x.permute(0, 3, 1, 2), mean, var, scale, training=self.training, joint=self.joint)
        return (F.relu(y, inplace=True) if rectified else y).permute(0, 2, 3, 1)  # in place on a view would cost a copy

    def _sum(self, x: Tensor, kernel_sizes: int = 2) -> Tensor:
        """Sum over the states and kernel sizes: what all edges add to the nodes' channels."""
        return summed(x, (kernel_sizes, *self.axes[1:]), (0, 1))

    def _depthwise_filters(self) -> tuple[Tensor, ...]:
        """The filters of each of the three blocks, (2 * E * C / K, 1, 5, 5)."""
        framed = torch.stack([F.pad(self.depthwise_3x3, (1, 1, 1, 1)), self.depthwise_5x5], dim=1)
        return framed.flatten(1, 3).unbind(0)

    def _pointwise_filters(self) -> tuple[Tensor, ...]:
        """The filters of each of the three blocks, (2 * E * C / K, C / K * edges of a group, 1, 1).

        A group holds one edge or more. On a CPU groups of sixteen channels are the fastest, or of more if an edge has
        more. Elsewhere grouped kernels are slow, so that a single group is better as long as it is not very wide.
        """
        edges = 2 * self.sources * self.targets
        width = 16 if self.pointwise.device.type in kernels.OURS else 256
        together = math.gcd(edges, max(1, width // self.mixed))
        filters = self.pointwise.flatten(1, 2)
        if together > 1:
            own_edge = torch.eye(together, dtype=filters.dtype, device=filters.device)
            filters = filters.view(3, -1, together, self.mixed, 1, self.mixed) * own_edge[:, None, :, None]
        return filters.reshape(3, edges * self.mixed, together * self.mixed, 1, 1).unbind(0)

    def _skip_filters(self) -> Tensor:
        """FactorizedReduce's two halves: from the even and the odd pixels of each state to its edges' channels."""
        s, t, c = self.sources, self.targets, self.mixed
        weight = self.skip.view(2, s, t, c // 2, c).permute(0, 1, 4, 2, 3)[:, :, :, None, :, None]
        return (weight * self.own_half).reshape(2 * s * c, s * t * c).t()[..., None, None]

    def _spread(self, x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        """Distribute channels to the nodes, weighted by (B, S, T): one weight for each block of channels and edge.

        x (N, H, W, S * B * C / K) -> (N, H, W, T * D); `places` (B, C / K, 1, D) says which of a node's D channels
        each channel of a block becomes.
        """
        matrix = weights.transpose(0, 1)[:, :, None, :, None] * places
        return pointwise_convolution(x, matrix.flatten(0, 2).flatten(1).t()[..., None, None])


def _even_and_odd(x: Tensor) -> tuple[Tensor, Tensor]:
    """What FactorizedReduce reads: the even pixels, and the odd ones, zero-padded after an odd H or W."""
    odd = F.pad(x[:, 1::2, 1::2], (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return x[:, ::2, ::2], odd


class GroupedCell(nn.Module):
    """Two states in, four nodes, their concatenation (N, 4 * channels, H, W) out; H and W halved if `reduces`."""

    def __init__(
        self, in_channels: tuple[int, int], channels: int, partial: int, reduces: bool, previous_reduces: bool
    ):
        super().__init__()
        plain = PlainCell(in_channels, channels, partial, reduces, previous_reduces)  # draws the weights
        self.preprocess0, self.preprocess1 = plain.preprocess0, plain.preprocess1
        self.register_buffer("every_kth", torch.eye(channels)[::partial].contiguous(), persistent=False)
        strides = [2 if reduces and 0 in states else 1 for states in STATES]
        self.edges = nn.ModuleList(
            StateEdges(states, channels, partial, stride) for states, stride in zip(STATES, strides, strict=True)
        )
        self.load_state_dict(from_plain(plain.state_dict()))

    def forward(self, state0: Tensor, state1: Tensor, *weights: Tensor) -> Tensor:
        """`weights`: one tensor for each of the four `StateEdges`, beta included."""
        state = torch.cat([self.preprocess0(state0), self.preprocess1(state1)], dim=1).permute(0, 2, 3, 1)
        # From here on tensors keep the inputs' type; what BatchNorm needs stays in the weights' type, float32.
        device = state.device.type
        autocasts = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if autocasts else contextlib.nullcontext():
            return self._nodes(state, weights)

    def _nodes(self, state: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        nodes: list[Tensor] = []
        reached: tuple[Tensor, ...] = ()  # what has reached the nodes to come: their mixed channels, all their channels
        for edges, weight in zip(self.edges, weights, strict=True):
            more = edges(state, weight)
            reached = tuple(map(torch.add, reached, more)) if reached else more
            (mixed, bypass), reached = zip(*(_first_node(x, edges.targets) for x in reached), strict=True)
            # A node is the sum of its edges. The shuffle: every K-th channel is a mixed one.
            state = bypass + product(mixed, self.every_kth)
            nodes.append(state)
        return torch.cat(nodes, dim=3).permute(0, 3, 1, 2)


def _first_node(x: Tensor, nodes: int) -> tuple[Tensor, Tensor | None]:
    """The channels of the first of the nodes, and of the others if there are any."""
    channels = x.shape[3] // nodes
    return x.split([channels, x.shape[3] - channels], dim=3) if nodes > 1 else (x, None)


class SuperNet(SearchNetwork):
    """The search network. `arch_parameters()` are alpha and beta, `weight_parameters()` all others.

    It starts with the weights that `PlainSuperNet` draws from the same generator, bit for bit, so that a seed names
    one search whichever form runs it. For that each cell draws its weights as a `PlainCell`, in the same order, and
    stacks them.
    """

    cell = GroupedCell

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                self.set_submodule(name, BatchNorm2d(module.num_features, affine=module.affine))
        # Buffers, since an index in a list would be copied to the device in every pass.
        by_state = [row for states in STATES for row in edge_rows(states)]
        self.register_buffer("weighted_operations", torch.tensor([*MIXED, SKIP]), persistent=False)
        self.register_buffer("edges_by_state", torch.tensor(by_state), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, num_classes)."""
        return super().forward(images.contiguous(memory_format=torch.channels_last))

    def _mixing_weights(self, cell: str) -> tuple[Tensor, ...]:
        """The weights (6 + K, S, T) of the edges of each of the `STATES`."""
        alphas, betas = super()._mixing_weights(cell)
        operations = (alphas * betas[:, None]).t().index_select(0, self.weighted_operations)
        table = torch.cat([operations, betas.expand(self.partial - 1, EDGES)]).index_select(1, self.edges_by_state)
        sizes = [len(edge_rows(states)) for states in STATES]
        return tuple(
            part.unflatten(1, (len(states), -1)) for part, states in zip(table.split(sizes, 1), STATES, strict=True)
        )
