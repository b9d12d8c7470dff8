"""The embeddings of a surfaced model, batch by batch, on the CPU in float32."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm

from sparc_loss.embeddings.reading_names import Reading


class Encoder:
    """Embeds texts and images with a model from `surface_embeddings`.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        batch_size: texts at a time.
        device: the model's.
        input_dtype: of the images.
        autocast: makes the context in which the model runs.
        progress: show progress bars for texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        input_dtype: torch.dtype = torch.float32,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device, self.input_dtype, self.autocast, self.progress = device, input_dtype, autocast, progress

    def texts(self, texts: Sequence[str], name: str = "texts") -> Tensor:
        """Pooled, normalised text features [M, D]; `name` is that of the progress bar."""
        encoded = [self._run(self.model.encode_text, ids, normalize=True) for ids in self._ids(texts, name)]
        return torch.cat(encoded)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings [M, L, D] and the mask of valid tokens [M, L]."""
        encoded = [self._run(self.model.encode_tokens, ids) for ids in self._ids(texts)]
        features, masks = zip(*encoded, strict=True)
        return torch.cat(features), torch.cat(masks)

    def token_sums(self, texts: Sequence[str], name: str = "tokens") -> Tensor:
        """The sums of the valid token embeddings [M, D], without holding those of all texts in memory."""
        sums = []
        for ids in self._ids(texts, name):
            features, mask = self._run(self.model.encode_tokens, ids)
            sums.append((features * mask.unsqueeze(-1)).sum(dim=1))
        return torch.cat(sums)

    def pooled(self, images: Tensor) -> Tensor:
        """Pooled, normalised image features [B, D] of one batch."""
        features: Tensor = self._run(self.model.encode_image, images.to(self.input_dtype), normalize=True)
        return features

    def patches(self, images: Tensor, reading: Reading = "last") -> tuple[Tensor, tuple[int, int]]:
        """Patch embeddings [B, P, D] of one batch, and the grid's height and width."""
        options = {} if reading == "last" else {"reading": reading}
        patches, grid = self._run(self.model.encode_patches, images.to(self.input_dtype), **options)
        return patches, grid

    def classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Prompt ensembles [C, D], as open_clip averages them."""
        with self.autocast():
            weights = open_clip.build_zero_shot_classifier(
                self.model,
                self.tokenizer,
                names,
                templates,
                num_classes_per_batch=max(1, self.batch_size // len(templates)),
                device=self.device,
                use_tqdm=self.progress,
            )
        features: Tensor = weights.T.float().cpu()
        return features

    def _ids(self, texts: Sequence[str], name: str | None = None) -> Iterable[Tensor]:
        starts = range(0, len(texts), self.batch_size)
        for start in tqdm(starts, desc=name, unit="batch", disable=name is None or not self.progress):
            yield self.tokenizer(list(texts[start : start + self.batch_size]))

    def _run(self, encode: Callable[..., Any], inputs: Tensor, **options: Any) -> Any:
        with self.autocast():
            encoded = encode(inputs.to(self.device), **options)
        if isinstance(encoded, Tensor):
            return encoded.float().cpu()
        features, other = encoded
        return features.float().cpu(), other.cpu() if isinstance(other, Tensor) else other
