"""Where the positions of a network's map lie in its image."""

import dataclasses
import math

__all__ = ["PixelGrid"]

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PixelGrid:
    """Where the positions of a map lie in the image at the top left of the network's batch.

    Every layer that strides in the ResNets here has an odd kernel and as much padding on both sides, so position i of a
    map of stride s is centred on pixel s i, in detectors as in segmenters, whatever the size of the image. What differs
    is the padding: a detector's batch has sides of s n, where n positions are as wide as n s pixels but begin half a
    stride before them, and a segmenter's has sides of s (n - 1) + 1, from the centre of the first to that of the last.
    Positions that are centred beyond the image are of its padding.

    Attributes:
        stride: Pixels between two positions.
        image_size: Height and width of the image in pixels, as the network saw it, without padding.
        map_size: Rows and columns of the map.
    """

    stride: int
    image_size: Size
    map_size: Size

    def __post_init__(self) -> None:
        if self.stride < 1 or min(*self.image_size, *self.map_size) < 1:
            raise ValueError(f"stride, image_size and map_size must be at least 1, got {self}.")
        # The other way round there is no limit: a larger image in the batch pads it by any number of positions.
        if any(size > self.stride * count for count, size in zip(self.map_size, self.image_size, strict=True)):
            raise ValueError(
                f"image of {self.image_size[0]} × {self.image_size[1]} pixels is larger than a map of "
                f"{self.map_size[0]} × {self.map_size[1]} positions at stride {self.stride}: pass the image that the "
                "network saw, after resizing."
            )

    @classmethod
    def of_batch(cls, image_size: Size, batch_size: Size, map_size: Size) -> "PixelGrid":
        """The grid of a map, from the size of the batch that it was computed of.

        Args:
            image_size: Height and width of the image.
            batch_size: Height and width of the padded batch.
            map_size: Rows and columns of the map.

        Raises:
            ValueError: If no stride makes such a map of such a batch.
        """
        # Halving with padding rounds up, so a map of stride s has ceil(size / s) positions.
        strides = [2**power for power in range(max(batch_size).bit_length() + 1)]
        for stride in strides:
            if tuple(math.ceil(size / stride) for size in batch_size) == tuple(map_size):
                return cls(stride, image_size, map_size)
        raise ValueError(
            f"A map of {map_size[0]} × {map_size[1]} positions is of no stride 1, 2, 4, ... of a batch of "
            f"{batch_size[0]} × {batch_size[1]} pixels."
        )

    @property
    def inside(self) -> Size:
        """How many rows and columns are centred on pixels of the image; further ones are padding."""
        rows, columns = (
            min(count, math.ceil(size / self.stride))
            for count, size in zip(self.map_size, self.image_size, strict=True)
        )
        return rows, columns

    def pixel_of(self, position: Size) -> Size:
        """The pixel (row, column) that a position is centred on."""
        return self.stride * position[0], self.stride * position[1]

    def position_of(self, y: float, x: float) -> Size:
        """The position that is centred nearest to the pixel (y, x), not in the padding.

        Raises:
            ValueError: If the image has no such pixel.
        """
        if not (0 <= y <= self.image_size[0] - 1 and 0 <= x <= self.image_size[1] - 1):
            raise ValueError(
                f"({y:g}, {x:g}) is no pixel of an image of {self.image_size[0]} × {self.image_size[1]}; rows and "
                "columns count from 0."
            )
        row, column = (
            min(math.floor(pixel / self.stride + 0.5), count - 1)
            for pixel, count in zip((y, x), self.inside, strict=True)
        )
        return row, column

    def image_extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the image in positions of the map, as matplotlib's `imshow` takes them."""
        height, width = self.image_size
        # Pixel i reaches from i - 1/2 to i + 1/2 around its centre.
        first, right, bottom = -0.5 / self.stride, (width - 0.5) / self.stride, (height - 0.5) / self.stride
        return first, right, bottom, first

    def key_box(self, kv_stride: int = 1) -> tuple[float, float, float, float]:
        """Left, top, width and height of the squares of all keys, in parts of the image's width and height.

        Args:
            kv_stride: Key (i, j) is at the position (i, j) times this, and its square as wide as this.
        """
        size = self.stride * kv_stride
        rows, columns = (math.ceil(count / kv_stride) for count in self.map_size)
        height, width = self.image_size
        first = 0.5 - size / 2
        return first / width, first / height, columns * size / width, rows * size / height

    def keys_inside(self, kv_stride: int = 1) -> Size:
        """How many rows and columns of keys are centred on pixels of the image."""
        rows, columns = (math.ceil(count / kv_stride) for count in self.inside)
        return rows, columns
