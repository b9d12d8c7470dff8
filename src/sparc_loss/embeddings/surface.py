"""`surface_embeddings`: any open_clip model also returns patch and token embeddings while it trains.

The model stays the same object with the same parameters and state_dict. Only its class and those of its towers are
replaced by subclasses that return these embeddings. So checkpoints load in plain open_clip and vice versa, and code
that uses the model (clamping logit_scale, locking towers, gradient checkpointing, isinstance) works unchanged.
"""

import inspect
from typing import Any, TypeVar

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss.embeddings.image_size import at_image_size
from sparc_loss.embeddings.reading_names import Reading
from sparc_loss.embeddings.readings import read_as
from sparc_loss.embeddings.text import check_text_tower, forward_with_tokens, tower_with_tokens
from sparc_loss.embeddings.token_mask import TokenConventions, Tokens, check_tokens, token_conventions
from sparc_loss.embeddings.towers import SurfacedTower, restore_tower, surface_tower
from sparc_loss.embeddings.vision import Images, check_vision_tower, forward_with_patches

Model = TypeVar("Model", bound=nn.Module)

# In open_clip 4 the CoCaTask makes the labels and cuts the logits to them.
COCA_OUTPUTS_LABELS = "output_labels" in inspect.signature(CoCa.forward).parameters


class Surfaced:
    """The methods of a surfaced model beyond those of its open_clip class; mixed in before that class."""

    # Of the open_clip class.
    training: bool
    visual: Any
    text: Any
    logit_scale: Tensor
    logit_bias: Tensor | None
    # Set by `surface_embeddings`.
    _token_conventions: TokenConventions
    _tokens: Tokens
    _unsurfaced_output_dict: bool | None

    def forward(self, image: Images | None = None, text: Tensor | None = None) -> Any:
        """In training mode, open_clip's output dictionary with three more entries; else open_clip's own forward.

        Args:
            image: [B, 3, H, W], or NaFlex patches (`sparc_loss.embeddings.vision.Images`).
            text: token ids [B, L].

        Returns:
            In training mode, given both: image_features and text_features [B, D], L2-normalised; logit_scale, and
            logit_bias if the model has one; patch_features [B, P, D] and token_features [B, L, D], not normalised;
            token_mask bool [B, L]. A fourth entry for NaFlex patches: patch_mask bool [B, P], False for padding.
        """
        if not self.training or image is None or text is None:
            return super().forward(image, text)  # type: ignore[misc]  # of the open_clip class
        image_features, patch_features, _, patch_mask = self.visual(image, with_embeddings=True)
        text_features, token_features = self._text_with_tokens(text)
        output = {
            "image_features": F.normalize(image_features, dim=-1),
            "text_features": F.normalize(text_features, dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            # Not the parameter itself: FSDP2 frees it after the forward pass, before the loss.
            output["logit_bias"] = self.logit_bias.clone()
        return output | self._embeddings(patch_features, patch_mask, token_features, text)

    def _text_with_tokens(self, texts: Tensor) -> tuple[Any, Tensor]:
        """`forward_with_tokens`, by the text tower's own call where there is one."""
        return forward_with_tokens(self, texts) if isinstance(self, CLIP) else self.text(texts, with_embeddings=True)

    def _embeddings(
        self, patch_features: Tensor, patch_mask: Tensor | None, token_features: Tensor, texts: Tensor
    ) -> dict[str, Tensor]:
        return {
            "patch_features": patch_features,
            "token_features": token_features,
            "token_mask": self._token_conventions.mask(texts, self._tokens),
            **({} if patch_mask is None else {"patch_mask": patch_mask}),
        }

    def encode_patches(
        self, images: Images, normalize: bool = False, reading: Reading = "last"
    ) -> tuple[Tensor, tuple[int, int] | None]:
        """Patch embeddings, row by row, and the grid's height and width; in any mode.

        Args:
            images: [B, 3, H, W], also of another size than the model's, whose position embeddings are interpolated
                then; or NaFlex patches (`sparc_loss.embeddings.vision.Images`).
            normalize: to length 1.
            reading: what the last block of a ViT gives (`sparc_loss.embeddings.readings`); training uses "last".

        Returns:
            [B, P, D]. With patch dropout, in training mode, P is what is left of height * width, in the order drawn.
            The grid; None of NaFlex patches, which are in the order given and padding among them.

        Raises:
            ValueError: an unknown reading, or images of another size for a tower that takes one size only.
            TypeError: a tower for which the reading has no meaning.
        """
        size = None if isinstance(images, dict) else (images.shape[-2], images.shape[-1])
        with at_image_size(self.visual, size), read_as(self.visual, reading):
            _, patches, grid, _ = self.visual(images, with_embeddings=True)
        return F.normalize(patches, dim=-1) if normalize else patches, grid

    def encode_tokens(self, texts: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
        """Token embeddings [B, L, D] of token ids [B, L], and the mask of valid tokens, bool [B, L].

        In any mode.
        """
        _, tokens = self._text_with_tokens(texts)
        mask = self._token_conventions.mask(texts, self._tokens)
        return F.normalize(tokens, dim=-1) if normalize else tokens, mask


class SurfacedCLIP(Surfaced, CLIP):
    """open_clip's CLIP with its patch and token embeddings surfaced."""


class SurfacedCustomTextCLIP(Surfaced, CustomTextCLIP):
    """open_clip's CustomTextCLIP with its patch and token embeddings surfaced."""


class SurfacedCoCa(Surfaced, CoCa):
    """open_clip's CoCa with its patch and token embeddings surfaced; CoCa always returns dictionaries."""

    def forward(
        self,
        image: Images | None = None,
        text: Tensor | None = None,
        image_latent: Tensor | None = None,
        image_embs: Tensor | None = None,
        output_labels: bool = COCA_OUTPUTS_LABELS,
    ) -> dict[str, Tensor]:
        """In training mode, CoCa's output dictionary with three more entries; else open_clip's own forward.

        Args:
            image: [B, 3, H, W].
            text: token ids [B, L].
            image_latent: with `image_embs`, what an earlier pass gave for `image` (generation); left to open_clip.
            image_embs: see `image_latent`.
            output_labels: whether to return the labels of the captioning loss, and logits for them alone; open_clip 3.

        Returns:
            In training mode, given image and text: CoCa's own entries (open_clip/coca_model.py, CoCa.forward), then
            patch_features [B, P, D] and token_features [B, L, D], not normalised, and token_mask bool [B, L].
        """
        if not self.training or image is None or text is None or image_latent is not None:
            labels = {"output_labels": output_labels} if COCA_OUTPUTS_LABELS else {}
            return CoCa.forward(self, image, text, image_latent, image_embs, **labels)
        (image_latent, image_embs), patch_features, _, patch_mask = self.visual(image, with_embeddings=True)
        (text_latent, token_embs), token_features = self._text_with_tokens(text)
        output = {
            "image_features": F.normalize(image_latent, dim=-1),
            "text_features": F.normalize(text_latent, dim=-1),
            "logits": self.text_decoder(image_embs, token_embs[:, :-1] if output_labels else token_embs),
            "logit_scale": self.logit_scale.exp(),
        }
        if output_labels:
            output["labels"] = text[:, 1:]
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias.clone()
        return output | self._embeddings(patch_features, patch_mask, token_features, text)


SURFACED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    CLIP: SurfacedCLIP,
    CustomTextCLIP: SurfacedCustomTextCLIP,
    CoCa: SurfacedCoCa,
}


def surface_embeddings(model: Model, tokenizer: Any, tokens: Tokens = "words") -> Model:
    """Make an open_clip model return patch and token embeddings in training mode, and give it two encoders.

    Call it before DistributedDataParallel or torch.compile. Calling it again only takes the new tokenizer and tokens;
    `restore` undoes it. It also sets `model.output_dict`, so that the model returns dictionaries in both modes (CoCa
    always does).

    Args:
        model: an open_clip CLIP, CustomTextCLIP or CoCa.
        tokenizer: the model's own, from `open_clip.get_tokenizer`; its conventions separate words from padding.
        tokens: the positions for which `token_mask` is True: "words" (no start, end or padding) or "all" (no padding).

    Returns:
        The model: the same object, with `encode_patches` and `encode_tokens`.

    Raises:
        TypeError: a model, tower or tokenizer that is not known, by name; a TorchScript, compiled or wrapped model.
        ValueError: unknown `tokens`.
    """
    check_tokens(tokens)
    conventions = token_conventions(tokenizer)
    surfaced: Any = model
    if not isinstance(model, Surfaced):
        check_model(model)
        surfaced._unsurfaced_output_dict = getattr(model, "output_dict", None)  # CoCa has none
        surfaced.__class__ = SURFACED_CLASSES[type(model)]
    surface_tower(surfaced.visual, forward_with_patches)
    if not isinstance(model, CLIP):
        surface_tower(surfaced.text, tower_with_tokens)
    if surfaced._unsurfaced_output_dict is not None:
        surfaced.output_dict = True
    surfaced._token_conventions = conventions
    surfaced._tokens = tokens
    return model


def restore(model: Model) -> Model:
    """Undo `surface_embeddings`: the classes and `output_dict` are the model's own again. A plain model is left alone.

    Raises:
        TypeError: a surfaced model whose class, or a tower's, was replaced since, as `fully_shard` does.
    """
    if isinstance(model, Surfaced):
        plain_classes = {surfaced: plain for plain, surfaced in SURFACED_CLASSES.items()}
        towers = [model.visual, *([] if isinstance(model, CLIP) else [model.text])]
        for each in (model, *towers):
            known = type(each) in plain_classes if each is model else _swapped_by_us(each)
            if not known:
                raise TypeError(
                    f"model has the class {type(each).__name__}, made of a surfaced one since (as fully_shard makes "
                    "one); expected the model as surface_embeddings returned it, or its state_dict in a new model"
                )
        for tower in towers:
            restore_tower(tower)
        model.__class__ = plain_classes[type(model)]
        if model._unsurfaced_output_dict is not None:
            model.output_dict = model._unsurfaced_output_dict
        del model._unsurfaced_output_dict, model._token_conventions, model._tokens
    return model


def _swapped_by_us(tower: Any) -> bool:
    """Whether the tower has the class that `surface_tower` gave it, or its own."""
    return not isinstance(tower, SurfacedTower) or SurfacedTower in type(tower).__bases__


def check_model(model: Any) -> None:
    """Raise TypeError, naming what was found, unless `surface_embeddings` knows the model and its towers."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model is a {name}, compiled by TorchScript, whose class cannot be swapped; expected an open_clip model "
            "created without jit (open_clip_train: without --torchscript and --trace)"
        )
    if type(model) not in SURFACED_CLASSES:
        hint = "; surface the model before it is wrapped" if _holds_open_clip_model(model) else ""
        raise TypeError(f"model is a {name}; expected open_clip's CLIP, CustomTextCLIP or CoCa{hint}")
    check_vision_tower(model.visual)
    check_text_tower(model)


def _holds_open_clip_model(model: Any) -> bool:
    """At any depth: PEFT's models hold it two levels deep."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(module, (Surfaced, *SURFACED_CLASSES)) for module in modules)
