"""Where the examples of a batch are in what enters a module: most models are batch-first, and some are not."""

from __future__ import annotations

from typing import NamedTuple

from torch import Size, Tensor


class Layout(NamedTuple):
    """Where the examples of a batch are in a module's input.

    Attributes:
        axis: the dimension along which they lie, each with as many slices as every other one.
        outer: whether the slices of an example are neighbours, as the windows of an image are. Otherwise the examples
            take turns, as in (T b) x d, the flattened form of T x b x d.
    """

    axis: int = 0
    outer: bool = True

    def parts(self, x: Tensor, count: int, examples: int) -> Tensor:
        """x as count x rows x features: one part for each of `count` equal groups of neighbouring examples.

        Args:
            x: a module's input, any shape that ends in its features.
            count: of the groups.
            examples: of the batch; a multiple of `count`.
        """
        front = x.movedim(self.axis, 0)
        if not self.outer:
            front = front.unflatten(0, (-1, count, examples // count)).transpose(0, 1)
        return front.reshape(count, -1, x.shape[-1])

    def whole(self, parts: Tensor, shape: Size, examples: int) -> Tensor:
        """What `parts` took apart, put together again.

        Args:
            parts: count x rows x features, which may be other features.
            shape: of the module's input without its features.
            examples: of the batch.
        """
        count, features = len(parts), parts.shape[-1]
        others = [size for axis, size in enumerate(shape) if axis != self.axis]
        if not self.outer:
            parts = parts.reshape(count, -1, examples // count, *others, features).transpose(0, 1)
        return parts.reshape(shape[self.axis], *others, features).movedim(0, self.axis)

    def group(self, x: Tensor, number: int, count: int, rows: int, examples: int) -> Tensor:
        """A view of the first examples of one group, in the order of x's dimensions, with the examples' own dimension.

        Args:
            x, count, examples: as for `parts`.
            number: of the group, from 0.
            rows: how many of its examples.

        Returns:
            x with `axis` replaced by two dimensions: rows x slices, or slices x rows where examples take turns.
        """
        axis, own = self.axis, examples // count
        if self.outer:
            return x.unflatten(axis, (count, own, -1)).select(axis, number).narrow(axis, 0, rows)
        return x.unflatten(axis, (-1, count, own)).select(axis + 1, number).narrow(axis + 1, 0, rows)


BATCH_FIRST = Layout()
