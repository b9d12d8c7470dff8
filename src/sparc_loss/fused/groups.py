"""A batch as groups of captions of similar length, which bounds the padding and the memory.

Captions are short and the text context is long: of 77 positions, about 16 hold words. But in every batch some caption
is nearly full, so that cutting the batch to its longest caption saves nothing. Here masked tokens are removed from
every caption (they need not be at the end), captions are sorted by their number of valid tokens, and neighbours form
groups. The losses process one group at a time in a workspace of `chunk_bytes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_loss._checks import check_number
from sparc_loss.functional import AlignmentSettings

# The cache of a CPU decides: with 8 MiB, 2 threads are 2 to 4 times faster than with 1 MiB, and as fast as with 32.
CPU_CHUNK_BYTES = 8 * 2**20
# On a GPU every group costs some forty kernel launches: on an H100, a quarter of the groups takes 60 % of the time.
OTHER_CHUNK_BYTES = 512 * 2**20
# Maximum number of padded positions per valid token: more padding means fewer groups.
CPU_PADDING, OTHER_PADDING = 0.1, 1.0


@dataclass(frozen=True)
class Settings:
    """How to compute a fused loss.

    Attributes:
        alignment: of the loss.
        chunk_bytes: bound of the workspace of one group.
        padding: maximum number of padded positions per valid token.
        recompute: compute the gradient in backward, from the inputs.
    """

    alignment: AlignmentSettings
    chunk_bytes: int
    padding: float
    recompute: bool


def settings_for(
    device: torch.device, alignment: AlignmentSettings, chunk_bytes: int | None, recompute: bool
) -> Settings:
    """The settings with this device's defaults.

    Raises:
        TypeError: a chunk_bytes that is not a number.
        ValueError: a chunk_bytes below 1.
    """
    on_cpu = device.type == "cpu"
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if on_cpu else OTHER_CHUNK_BYTES
    check_number("chunk_bytes", chunk_bytes, 1)
    return Settings(alignment, chunk_bytes, CPU_PADDING if on_cpu else OTHER_PADDING, recompute)


class Group(NamedTuple):
    """Captions of similar length, and the positions of their valid tokens.

    Attributes:
        captions: int64 [G], rows of the batch.
        positions: int64 [G, N], of the valid tokens in their order, then of masked ones.
        valid: bool [G, N], True for valid tokens.
        numbers: int64 [G], of valid tokens.
    """

    captions: Tensor
    positions: Tensor
    valid: Tensor
    numbers: Tensor

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """The index of the tokens [G, N] in a tensor [B, L, ...]."""
        return self.captions[:, None], self.positions

    def tokens(self, token_features: Tensor, dtype: torch.dtype) -> Tensor:
        """The group's tokens [G, N, D], zero where they are not valid."""
        return token_features[self.places].to(dtype).masked_fill_(~self.valid[..., None], 0)


class Groups:
    """The groups of a batch.

    Args:
        valid_tokens: bool [B, L].
        shape: of the patches, [B, P, D].
        itemsize: bytes of a number in the workspace.
        settings: bound of the workspace and of the padding.
        images: with how many images each caption is aligned.
    """

    def __init__(
        self, valid_tokens: Tensor, shape: Sequence[int], itemsize: int, settings: Settings, images: int = 1
    ) -> None:
        self.numbers, self.captions = valid_tokens.sum(dim=1).sort()
        self.positions = valid_tokens.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        self.slices = list(caption_slices(self.numbers.tolist(), shape[1], shape[2], itemsize, settings, images))

    @property
    def empty(self) -> Tensor:
        """Captions without a valid token, which are in no group: int64 [E]."""
        return self.captions[: self.slices[-1][0].start if self.slices else None]

    def __iter__(self) -> Iterator[Group]:
        for group, longest in self.slices:
            captions, numbers = self.captions[group], self.numbers[group]
            valid = torch.arange(longest, device=numbers.device) < numbers[:, None]
            yield Group(captions, self.positions[captions, :longest], valid, numbers)


def caption_slices(
    numbers: list[int], patches: int, dim: int, itemsize: int, settings: Settings, images: int = 1
) -> Iterator[tuple[slice, int]]:
    """Slices of the sorted captions and the longest caption of each; empty captions are in none."""
    stop = len(numbers)
    while stop and numbers[stop - 1]:
        longest = tokens = numbers[stop - 1]
        start = stop - 1
        # The peak: patches and their gradient, twelve [N, D], six [N, P] and eight [N, N].
        per_token = 12 * dim + 6 * patches + 8 * longest
        # For each further image, two [N, D] and two [N, P] are kept: see image_contrast.py.
        per_token += (images - 1) * 2 * (dim + patches)
        per_caption = itemsize * (2 * patches * dim + longest * per_token)
        while start and numbers[start - 1]:
            tokens += numbers[start - 1]
            size = stop - start + 1
            if size * per_caption > settings.chunk_bytes or size * longest > (1 + settings.padding) * tokens:
                break
            start -= 1
        yield slice(start, stop), longest
        stop = start
