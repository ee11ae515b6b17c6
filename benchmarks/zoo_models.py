"""The models of the zoo: what each section lists, and how one of them is built, with random weights and inputs.

One rule for input sizes: an image model that states a fixed size gets it (256 where the constructor takes a smaller
`img_size` than it states); any other gets the first of 64, 128 and its own size at which it runs. Batch size 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import shim
import torch
from torch import nn
from zoo_check import Arguments, outputs, randomise

shim.install()

Built = tuple[nn.Module, Arguments]


class NotApplicable(Exception):
    """A model is left out on purpose; the message says why."""


def build(section: str, name: str) -> Built:
    """A model in eval mode and what its forward is called with.

    Raises:
        NotApplicable: it is left out on purpose.
    """
    torch.manual_seed(0)
    model, inputs = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[section](name)
    randomise(model)
    return _sized(model, inputs) if callable(inputs) else (model, inputs)


def _sized(model: nn.Module, inputs: Callable[[], Iterator[Arguments]]) -> Built:
    """The model with the first inputs it runs on.

    Raises:
        Exception: what the last of them raised.
    """
    candidates = list(inputs())
    for k, given in enumerate(candidates):
        try:
            outputs(model, given)
            return model, given
        except Exception:
            if k == len(candidates) - 1:
                raise
    raise AssertionError("no inputs")


def images(*shape: int) -> Arguments:
    """One batch of random images."""
    return Arguments((torch.rand(*shape, generator=torch.Generator().manual_seed(1)),))


def _sizes(own: int, *shape: int) -> Callable[[], Iterator[Arguments]]:
    """Images of growing sizes up to `own`."""
    return lambda: (images(*shape, s, s) for s in dict.fromkeys([*(s for s in (64, 128) if s < own), own]))


# -- timm --------------------------------------------------------------------------------------------------------


def timm_sizes(only: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """Per family of timm (or those that have a name in `only`), the parameters of each architecture, counted without
    allocating them."""
    import timm

    found: dict[str, dict[str, int]] = {}
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if only and family not in only and not set(names) & set(only):
            continue
        for name in names:
            with torch.device("meta"):
                found.setdefault(family, {})[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return found


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    own = max((cfg.input_size if cfg else (3, 224, 224))[1:])
    fixed = bool(cfg and cfg.fixed_input_size)
    if fixed and own > 256:
        try:
            return timm.create_model(name, img_size=256), images(1, 3, 256, 256)
        except Exception:  # a constructor without `img_size`, or windows that do not divide it
            pass
    model = timm.create_model(name)
    return model, images(1, 3, own, own) if fixed else _sizes(own, 1, 3)


# -- torchvision -------------------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """Every model of torchvision; a detection model with region proposals has two parts, its heads being the second."""
    from torchvision import models

    quantised = set(models.list_models(module=models.quantization))
    detection = models.list_models(module=models.detection)
    heads = [f"{name}/roi_heads" for name in detection if "rcnn" in name]
    return [*(name for name in models.list_models() if name not in quantised), *heads, *sorted(quantised)]


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    from torchvision import models

    plain, _, part = name.partition("/")
    if plain in models.list_models(module=models.quantization):
        raise NotApplicable("a quantised model holds packed integer weights, which have no channels to take out")
    none = {"weights": None}
    if plain in models.list_models(module=models.detection):
        return _detection(models.get_model(plain, weights_backbone=None, **none), part)
    if plain in models.list_models(module=models.segmentation):
        return models.get_model(plain, weights_backbone=None, **none), _sizes(128, 1, 3)
    if plain in models.list_models(module=models.video):
        size = 224 if plain.startswith(("mvit", "s3d")) else 64
        return models.get_model(plain, **none), images(1, 3, 16, size, size)
    if plain in models.list_models(module=models.optical_flow):
        pair = images(2, 1, 3, 128, 128).args[0]
        return models.get_model(plain, **none), Arguments((*pair, 2))  # updates of the flow
    if plain.startswith("vit"):  # the size is a multiple of the patch, which the name ends with
        size = 4 * int(plain.rsplit("_", 1)[-1])
        return models.get_model(plain, image_size=size, **none), images(1, 3, size, size)
    if plain == "maxvit_t":
        return models.get_model(plain, **none), images(1, 3, 224, 224)
    options = {"init_weights": False} if plain in ("googlenet", "inception_v3") else {}
    return models.get_model(plain, **none, **options), _sizes(224, 1, 3)


class Dense(nn.Module):
    """The part of a detection model that maps images to tensors: backbone, then the dense head on its features.

    What comes before (resizing) and after (anchors, thresholds, non-maximum suppression) depends on values.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images: torch.Tensor) -> Any:
        features = self.backbone(images)
        return self.head(list(features.values()) if isinstance(features, dict) else [features])


class RoiHeads(nn.Module):
    """The heads of a two-stage detection model, from pooled region features to tensors."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        names = (f"{kind}_{part}" for kind in ("box", "mask", "keypoint") for part in ("head", "predictor"))
        for name in names:
            setattr(self, name, getattr(heads, name, None))

    def forward(self, boxes: torch.Tensor, regions: torch.Tensor) -> list[Any]:
        found = [self.box_predictor(self.box_head(boxes))]
        if self.mask_head is not None:
            found.append(self.mask_predictor(self.mask_head(regions)))
        if self.keypoint_head is not None:
            found.append(self.keypoint_predictor(self.keypoint_head(regions)))
        return found


def _detection(detector: nn.Module, part: str) -> tuple[nn.Module, Any]:
    """The tensor part of a detection model."""
    if not part:
        return Dense(detector), images(1, 3, 320, 320) if "SSD" in type(detector).__name__ else _sizes(128, 1, 3)
    channels = detector.backbone.out_channels
    return RoiHeads(detector.roi_heads), Arguments(
        (images(3, channels, 7, 7).args[0], images(3, channels, 14, 14).args[0])
    )


# -- transformers ------------------------------------------------------------------------------------------------


def _tokens(length: int = 9) -> dict[str, Any]:
    return {"input_ids": torch.arange(length)[None] * 5 % 97 + 1}


def _pixels(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": images(1, 3, size, size).args[0]}


def _translation() -> dict[str, Any]:
    return _tokens() | {"decoder_input_ids": _tokens(7)["input_ids"]}


def _features() -> dict[str, Any]:
    noise = torch.randn(1, 11, 26, generator=torch.Generator().manual_seed(1))
    return {"input_features": noise, "decoder_input_ids": _tokens(7)["input_ids"]}


def _audio() -> dict[str, Any]:
    return {"input_values": torch.randn(1, 700, generator=torch.Generator().manual_seed(1))}


_WIDE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
_TEXT = _WIDE | {"vocab_size": 101, "max_position_embeddings": 33}
_CLASSES = _TEXT | {"num_labels": 5}
_CAUSAL = _TEXT | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "pad_token_id": 0}
"""Half of 6 pairs and half of 12 channels agree, as they do for the 64 or 128 channels of a real head."""
_UNIFORM = {k: v for k, v in _CAUSAL.items() if k != "head_dim"} | {"hidden_size": 72}
_VISION = _WIDE | {"image_size": 32, "patch_size": 8}
_TOWERS = {
    "text_config": _TEXT | {"eos_token_id": 2},
    "vision_config": _VISION | {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4},
}
_SEQUENCE = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "vocab_size": 101,
    "max_position_embeddings": 33,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any], Callable[[], dict[str, Any]]]] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", _CLASSES, _tokens),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", _CLASSES, _tokens),
    "DistilBERT": (
        *("DistilBertForSequenceClassification", "DistilBertConfig"),
        {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 3, "vocab_size": 101, "max_position_embeddings": 33}
        | {"num_labels": 5},
        _tokens,
    ),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", _CLASSES | {"embedding_size": 20}, _tokens),
    "DeBERTa": (
        *("DebertaForSequenceClassification", "DebertaConfig"),
        _CLASSES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 17},
        _tokens,
    ),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", _CLASSES | {"embedding_size": 20}, _tokens),
    "GPT-2": (
        *("GPT2LMHeadModel", "GPT2Config"),
        {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 80, "vocab_size": 101, "n_positions": 33},
        _tokens,
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, _tokens),
    "OPT": (
        *("OPTForCausalLM", "OPTConfig"),
        {k: v for k, v in _TEXT.items() if k != "intermediate_size"}
        | {"ffn_dim": 80, "word_embed_proj_dim": 20, "pad_token_id": 0},
        _tokens,
    ),
    "BLOOM": (
        *("BloomForCausalLM", "BloomConfig"),
        {"hidden_size": 48, "n_layer": 2, "n_head": 3, "vocab_size": 101},
        _tokens,
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _CAUSAL, _tokens),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _CAUSAL, _tokens),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _UNIFORM, _tokens),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", _CAUSAL, _tokens),
    "Phi": ("PhiForCausalLM", "PhiConfig", _UNIFORM | {"hidden_size": 48}, _tokens),
    "Mixtral": (
        *("MixtralForCausalLM", "MixtralConfig"),
        _CAUSAL | {"num_local_experts": 5, "num_experts_per_tok": 2},
        _tokens,
    ),
    "T5": (
        *("T5ForConditionalGeneration", "T5Config"),
        {"vocab_size": 101, "d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 3},
        _translation,
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", _SEQUENCE, _translation),
    "Whisper": (
        *("WhisperForConditionalGeneration", "WhisperConfig"),
        {k: v for k, v in _SEQUENCE.items() if k != "max_position_embeddings"}
        | {"num_mel_bins": 11, "max_source_positions": 13, "max_target_positions": 33, "decoder_start_token_id": 1},
        _features,
    ),
    "CLIP": ("CLIPModel", "CLIPConfig", _TOWERS | {"projection_dim": 20}, lambda: _tokens() | _pixels()),
    "SigLIP": (
        *("SiglipModel", "SiglipConfig"),
        _TOWERS | {"text_config": _TOWERS["text_config"] | {"projection_size": 40}},
        lambda: _tokens() | _pixels(),
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", _VISION | {"num_labels": 5}, _pixels),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", _VISION | {"num_labels": 5}, _pixels),
    "Swin": (
        *("SwinForImageClassification", "SwinConfig"),
        {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4},
        _pixels,
    ),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", _VISION | {"num_labels": 5}, _pixels),
    "SegFormer": (
        *("SegformerForSemanticSegmentation", "SegformerConfig"),
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [12, 30]}
        | {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 3], "mlp_ratios": [3, 2]}
        | {"decoder_hidden_size": 20, "num_labels": 5},
        lambda: _pixels(64),
    ),
    "DETR": (
        *("DetrForObjectDetection", "DetrConfig"),
        {k: v for k, v in _SEQUENCE.items() if k in ("d_model", "encoder_layers", "decoder_layers")}
        | {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72}
        | {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        | {"num_queries": 7, "num_labels": 5},
        _pixels,
    ),
    "Wav2Vec2": (
        *("Wav2Vec2ForCTC", "Wav2Vec2Config"),
        _WIDE
        | {"conv_dim": (20, 28), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 6, "vocab_size": 33, "mask_time_prob": 0.0},
        _audio,
    ),
    "Mamba": (
        *("MambaForCausalLM", "MambaConfig"),
        {"hidden_size": 24, "state_size": 7, "num_hidden_layers": 2, "conv_kernel": 4, "expand": 2}
        | {"time_step_rank": 5, "vocab_size": 101},
        _tokens,
    ),
}
"""Per name the class, its configuration's class, what that is given, and the inputs. Nothing is downloaded."""


def _transformers(name: str) -> tuple[nn.Module, Arguments]:
    library: Any = importlib.import_module("transformers")
    model, config, fields, inputs = TRANSFORMERS[name]
    if name == "DETR":
        backbone = {"embedding_size": 10, "hidden_sizes": [12, 20], "depths": [1, 1], "layer_type": "basic"}
        fields = dict(fields) | {"backbone_config": library.ResNetConfig(**backbone, out_features=["stage2"])}
    made = getattr(library, config)(**fields)
    if hasattr(made, "use_cache"):
        made.use_cache = False  # a cache is an output of Python objects, which no tool can follow
    return getattr(library, model)(made), Arguments((), inputs())
