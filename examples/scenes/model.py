"""A model of the scenes' size, as a folder that open_clip takes for `local-dir:FOLDER`, without any download.

Vision is open_clip's VisionTransformer over 8 x 8 patches, average-pooled before its last norm, so that a patch can
weigh more than another. Text is a small causal BERT, average-pooled as in the paper (open_clip's own text towers pool
one token), whose tokens are whole words: token i of a caption is word i. Few layers, and no word that sees the words
after it, keep words and patches about themselves: with more, each tells the whole, and CLIP points nowhere.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.factory import load_state_dict
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

from .captions import MAX_WORDS
from .folders import drafted
from .scene import IMAGE_SIZE
from .world import World
from .worlds import WORLDS

CONTEXT_LENGTH = 32
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"

_HEAD_WIDTH = 32
_VISION = {
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "head_width": _HEAD_WIDTH,
    "pool_type": "avg",
    "final_ln_after_pool": True,
}
_MEAN_POOLED = {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
_PAD, _UNKNOWN = "[PAD]", "[UNK]"

assert MAX_WORDS <= CONTEXT_LENGTH


Pooling = Literal["mean", "last"]


def write_model(
    folder: str | Path,
    captions: Iterable[str],
    seed: int = 0,
    *,
    pooling: Pooling = "mean",
    width: int = 96,
    vision_layers: int = 2,
    world: str = "digits",
) -> Path:
    """Write an untrained model.

    The weights are in the folder: open_clip would otherwise look for pretrained ones of the text tower.

    Args:
        folder: must not exist.
        captions: of whose words the tokenizer of the average-pooled text tower is made.
        seed: of the weights.
        pooling: of the text: "mean" is the small BERT; "last" is open_clip's own tower, of the same size, with its
            end-of-text token and its tokenizer.
        width: of both towers.
        vision_layers: of the vision tower.
        world: of the scenes it will see: a key of `worlds.WORLDS`.

    Returns:
        The folder, absolute. Keep it where it is: its configuration names its own path.

    Raises:
        FileExistsError: `folder` is there.
    """
    folder = Path(folder).resolve()
    vision = _VISION | {"width": width, "layers": vision_layers}
    with drafted(folder) as draft:
        if pooling == "mean":
            vocabulary = _write_tokenizer(draft, captions)
            _text_config(vocabulary, width).save_pretrained(draft)
            text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)} | _MEAN_POOLED
        else:
            text = {"width": width, "heads": width // _HEAD_WIDTH, "layers": 1}
        text["context_length"] = CONTEXT_LENGTH
        config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}
        _write_config(draft, config, _preprocessing(WORLDS[world]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(config, draft)
        _save_weights(model.state_dict(), draft)
    return folder


def warm_start(folder: str | Path, model_folder: str | Path, checkpoint: str | Path) -> Path:
    """Copy a model folder with the weights of a training checkpoint: the next training starts there, optimizer anew.

    Args:
        folder: the new one; must not exist.
        model_folder: what `write_model` or `warm_start` wrote.
        checkpoint: an `epoch_N.pt` of open_clip_train.

    Returns:
        The folder, absolute.

    Raises:
        FileExistsError: `folder` is there.
        FileNotFoundError: the model folder or the checkpoint is not.
    """
    folder = Path(folder).resolve()
    with drafted(folder) as draft:
        for file in Path(model_folder).iterdir():
            if file.name != WEIGHTS:
                shutil.copy(file, draft)
        whole = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
        config = whole["model_cfg"]
        if "hf_model_name" in config["text_cfg"]:
            config["text_cfg"] |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
        _write_config(draft, config, whole["preprocess_cfg"])
        _save_weights(load_state_dict(str(checkpoint)), draft)
    return folder


def _write_tokenizer(folder: Path, captions: Iterable[str]) -> int:
    """Write a tokenizer of whole words, without start and end tokens; returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=_UNKNOWN))
    # Punctuation goes, so that tokens and `caption.split()` go side by side.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), "")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        captions, trainers.WordLevelTrainer(special_tokens=[_PAD, _UNKNOWN], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, unk_token=_UNKNOWN, model_max_length=CONTEXT_LENGTH
    )
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _text_config(vocabulary: int, width: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=1,
        is_decoder=True,
        num_attention_heads=width // _HEAD_WIDTH,
        intermediate_size=4 * width,
        max_position_embeddings=CONTEXT_LENGTH,
        type_vocab_size=1,
        pad_token_id=0,
        # Small models on plenty of data do not overfit; dropout would only add noise.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _preprocessing(world: World) -> dict[str, list[float]]:
    return {"mean": [world.mean] * 3, "std": [world.std] * 3}


def _write_config(draft: Path, config: dict[str, Any], preprocessing: dict[str, list[float]]) -> None:
    whole = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (draft / CONFIG).write_text(json.dumps(whole, indent=2), encoding="utf-8")


def _build(config: dict[str, Any], draft: Path) -> torch.nn.Module:
    """The model of a draft, with random weights."""
    text = config["text_cfg"]
    if "hf_model_name" not in text:
        return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)
    text = {**text, "hf_model_name": str(draft), "hf_model_pretrained": False}
    return open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], text)


def _save_weights(state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, folder / WEIGHTS)
