"""A batch as groups of captions, which bounds the padding and the memory.

Captions are short and the text context is long: of 77 positions, about 16 hold words. But in every batch some caption
is nearly full, so that cutting the batch to its longest caption saves nothing. On a CPU, masked tokens are removed
from every caption (they need not be at the end), captions are sorted by their number of valid tokens, and neighbours
form groups. On other devices the host would have to wait for these numbers until the towers have run, and the products
cost little: there a group is a slice of the batch, with all positions. The losses process one group at a time in a
workspace of `chunk_bytes`.
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
# On a GPU every group costs some forty kernel launches: on an H100, 256 captions take 2.4 ms at once and 6.3 ms in 4
# groups. The workspace of 1024 captions is still smaller than what the eager loss keeps for backward.
OTHER_CHUNK_BYTES = 2**31
# Maximum number of padded positions per valid token: more padding means fewer groups.
CPU_PADDING = 0.1


@dataclass(frozen=True)
class Settings:
    """How to compute a fused loss.

    Attributes:
        alignment: of the loss.
        chunk_bytes: bound of the workspace of one group.
        padding: maximum number of padded positions per valid token; None is whole captions in the batch's order, which
            are grouped without reading their numbers of tokens from the device.
        recompute: compute the gradient in backward, from the inputs.
    """

    alignment: AlignmentSettings
    chunk_bytes: int
    padding: float | None
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
    return Settings(alignment, chunk_bytes, CPU_PADDING if on_cpu else None, recompute)


class Group(NamedTuple):
    """Some captions, and the positions of their tokens; all valid tokens are among them.

    Attributes:
        captions: int64 [G], rows of the batch.
        positions: int64 [G, N], of tokens.
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


class Groups(NamedTuple):
    """The groups of a batch.

    Attributes:
        groups: each of its captions is in one of them, or empty.
        empty: int64 [E], captions without a valid token that are in no group.
    """

    groups: list[Group]
    empty: Tensor


def groups_of(
    valid_tokens: Tensor, shape: Sequence[int], itemsize: int, settings: Settings, images: int = 1
) -> Groups:
    """Group the captions of a batch.

    Args:
        valid_tokens: bool [B, L].
        shape: of the patches, [B, P, D].
        itemsize: bytes of a number in the workspace.
        settings: bound of the workspace and of the padding.
        images: with how many images each caption is aligned.
    """
    batch, length = valid_tokens.shape
    numbers = valid_tokens.sum(dim=1)
    if settings.padding is None:
        every_caption = torch.arange(batch, device=valid_tokens.device)
        every_position = torch.arange(length, device=valid_tokens.device).expand(batch, length)
        size = max(1, int(settings.chunk_bytes // (itemsize * _workspace(length, shape, images))))
        slices = [slice(start, start + size) for start in range(0, batch, size)]
        whole = (every_caption, every_position, valid_tokens, numbers)
        return Groups([Group(*(each[part] for each in whole)) for part in slices], every_caption[:0])
    numbers, captions = numbers.sort()
    positions = valid_tokens.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    groups, start = [], batch
    bounds = (settings.chunk_bytes, settings.padding)
    for part, longest in caption_slices(numbers.tolist(), shape, itemsize, *bounds, images):
        valid = torch.arange(longest, device=numbers.device) < numbers[part, None]
        groups.append(Group(captions[part], positions[captions[part], :longest], valid, numbers[part]))
        start = part.start
    return Groups(groups, captions[:start])


def caption_slices(
    numbers: list[int], shape: Sequence[int], itemsize: int, chunk_bytes: float, padding: float, images: int = 1
) -> Iterator[tuple[slice, int]]:
    """Slices of captions sorted by their number of tokens, and the longest of each; empty captions are in none."""
    stop = len(numbers)
    while stop and numbers[stop - 1]:
        longest = tokens = numbers[stop - 1]
        start = stop - 1
        per_caption = itemsize * _workspace(longest, shape, images)
        while start and numbers[start - 1]:
            tokens += numbers[start - 1]
            size = stop - start + 1
            if size * per_caption > chunk_bytes or size * longest > (1 + padding) * tokens:
                break
            start -= 1
        yield slice(start, stop), longest
        stop = start


def _workspace(length: int, shape: Sequence[int], images: int) -> int:
    """The numbers in memory for a caption of N = `length` tokens at the peak."""
    _, patches, dim = shape
    # Patches and their gradient, twelve [N, D], six [N, P] and eight [N, N].
    per_token = 12 * dim + 6 * patches + 8 * length
    # For each further image, two [N, D] and two [N, P] are kept: see image_contrast.py.
    per_token += (images - 1) * 2 * (dim + patches)
    return 2 * patches * dim + length * per_token
