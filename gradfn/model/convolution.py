"""How a convolution turns its input and output gradient into the block of its weight."""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfn.linalg.kron import Kron, Side, apply_side
from gradfn.model.layers import Layer, diagonal_of, in_full_precision, is_matrix


@dataclass(frozen=True, eq=False)
class Conv(Layer):
    """A convolution over 1 to 3 axes: its inputs are patches, its positions the places of the output."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    kind = "convolution"
    by_default = sums_rows_first = True
    by_token = False

    @property
    def _axes(self) -> int:
        return len(self.module.kernel_size)

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        padding: list[int] = self.module._reversed_padding_repeated_twice
        return F.pad(x, padding, mode) if any(padding) else x

    def _by_group(self, x: Tensor) -> Tensor:
        """`[n, channels, *places] -> [n * groups, channels / groups, *places]`."""
        return x.unflatten(1, (self.module.groups, -1)).flatten(0, 1)

    def save_input(self, x: Tensor, right: Side) -> Tensor:
        """A convolution with the projection as its filters gives the projected patches."""
        if not is_matrix(right):
            return x
        assert isinstance(right, Tensor)
        x = x.to(right.dtype)
        bare = x.ndim == self._axes + 1
        x = self._by_group(self._padded(x[None] if bare else x))
        filters, shift = (right[:, :-1], right[:, -1]) if self.bias else (right, None)
        filters = filters.unflatten(1, (-1, *self.module.kernel_size))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self._axes - 1]
        with in_full_precision(x):
            saved = convolve(x, filters, shift, stride=self.module.stride, dilation=self.module.dilation)  # pyright: ignore
        saved = saved.flatten(2).unflatten(0, (-1, self.module.groups))
        return saved[0] if bare else saved  # [n, groups, q, places]

    def _patches(self, x: Tensor) -> Tensor:
        """`[n, channels, *places] -> [n, groups, inputs, places]`: the patch of each output place."""
        x = self._by_group(self._padded(x))
        for axis, (size, step, hole) in enumerate(
            zip(self.module.kernel_size, self.module.stride, self.module.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, (size - 1) * hole + 1, step)[..., ::hole]
        places = tuple(range(2, 2 + self._axes))
        kernel = tuple(range(2 + self._axes, 2 + 2 * self._axes))
        x = x.permute(0, 1, *kernel, *places).flatten(2 + self._axes)
        return x.flatten(1, -2).unflatten(0, (-1, self.module.groups))

    @property
    def has_factors(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.module.groups == 1

    def _grouped(self, saved: Tensor, g: Tensor, right: Side) -> tuple[Tensor, Tensor]:
        """The inputs of each group, `[batch, images, groups, inputs, places]`, and the output gradients."""
        size, groups = len(g), self.module.groups
        if is_matrix(right):
            x = saved.reshape(size, -1, *saved.shape[-3:])
        else:
            patches = self._patches(saved.reshape(-1, *saved.shape[-self._axes - 1 :]).to(g.dtype))
            x = patches.reshape(size, -1, *patches.shape[1:])
            if self.bias:
                x = torch.cat([x, x.new_ones(1).expand(*x.shape[:3], 1, x.shape[-1])], -2)
            x = x if right is None else x * diagonal_of(right)[:, None]
        return x, g.reshape(size, -1, groups, self.out_features // groups, prod(g.shape[-self._axes :]))

    def positions(self, g: Tensor, tokens: bool) -> int:
        return g[0].numel() // self.module.out_channels

    def factors(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool = False) -> tuple[Tensor, Tensor]:
        right, left = (v.squeeze(2).movedim(-1, 2).flatten(1, 2) for v in self._grouped(saved, g, kron.right))
        return right, apply_side(kron.left, left)

    def contract(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        # n: images of one example, e: groups, o: outputs of a group, i: inputs, t: places
        right, g = self._grouped(saved, g, kron.right)
        if is_matrix(kron.left):
            assert isinstance(kron.left, Tensor)
            left = torch.einsum("peo,bneot->bnept", kron.left.unflatten(1, (self.module.groups, -1)), g)
            return torch.einsum("bnept,bneqt->bpq", left, right)
        G = torch.einsum("bneot,bneit->beoi", g, right).flatten(1, 2)
        return G if kron.left is None else G * diagonal_of(kron.left)[:, None]
