"""open_clip's model configurations, sorted into the families of towers that README lists."""

from typing import Any

# By how timm's name of the trunk starts.
TIMM_TRUNKS = {
    "vit_relpos_": "VisionTransformerRelPos",
    "vit_pe_core_": "Eva",
    "vit_": "VisionTransformer",
    "vitamin_": "VisionTransformer",
    "eva": "Eva",
    "convnext_": "ConvNeXt",
    "fastvit_": "FastVit",
    "swin_": "SwinTransformer",
}
TIMM_POOLS = {
    ("VisionTransformerRelPos", ""): ", class token",
    ("VisionTransformer", "map"): ", attention pool",
    ("VisionTransformer", "token"): ", class token",
    ("VisionTransformer", "avg"): ", average",
    ("VisionTransformer", ""): ", average",
    ("Eva", "map"): ", attention pool",
    ("Eva", "token"): ", class token",
}
HF_MODELS = {
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "google/mt5": "mT5",
    "facebook/nllb": "NLLB",
    "bert": "BERT",
}


def vision_family(config: dict[str, Any]) -> str:
    """The family of the vision tower that open_clip builds from a model configuration."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        name = vision["timm_model_name"]
        trunk = next(trunk for start, trunk in TIMM_TRUNKS.items() if name.startswith(start))
        return f"timm's {trunk}{TIMM_POOLS.get((trunk, vision.get('timm_pool', 'avg')), '')}"
    if isinstance(vision["layers"], (list, tuple)):
        return "ModifiedResNet"
    if vision.get("attentional_pool"):
        return "VisionTransformer, attentional pooler"
    return {"tok": "VisionTransformer, class token", "avg": "VisionTransformer, average"}[
        vision.get("pool_type", "tok")
    ]


def text_family(config: dict[str, Any]) -> str:
    """The family of the text tower that open_clip builds from a model configuration."""
    text = config["text_cfg"]
    if "hf_model_name" in text:
        name = next(name for start, name in HF_MODELS.items() if text["hf_model_name"].startswith(start))
        return f"HFTextEncoder, {name}"
    if text.get("embed_cls"):
        return "TextTransformer, class token"
    if not config.get("custom_text"):
        return "CLIP's own"
    if text.get("proj_type") == "none":
        return "TextTransformer, no projection"
    return "TextTransformer, linear layer" if text.get("proj_bias") else "TextTransformer, matrix"
