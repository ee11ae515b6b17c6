"""Tiny random models of the transformers library: nothing is downloaded, sizes differ where the architecture lets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]


def hf(model: str, config: str, **fields: Any) -> nn.Module:
    """A model of the transformers library with random weights."""
    transformers = pytest.importorskip("transformers")
    options = {k: fields.pop(k) for k in ("attn_implementation", "experts_implementation") if k in fields}
    made = getattr(transformers, config)(**fields)
    for name, value in options.items():
        setattr(made, f"_{name}", value)
    return getattr(transformers, model)(made)


def tokens(length: int = 9, mask: bool = False) -> dict[str, Any]:
    """Two rows of different tokens; with `mask`, the second is padded at the end."""
    inputs = {"input_ids": torch.arange(2 * length).reshape(2, length) * 5 % 97 + 1}
    if mask:
        inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        inputs["attention_mask"][1, length - 2 :] = 0
    return inputs


def pixels(size: int = 32, channels: int = 3) -> dict[str, Any]:
    return {"pixel_values": torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))}


def causal(family: str, config: str = "", mask: bool = False, **fields: Any) -> Callable[[], Built]:
    """A causal language model in the manner of Llama: 6 query heads, 3 key/value heads of 12 channels."""

    def build() -> Built:
        sizes = {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 12,
            "vocab_size": 101,
            "max_position_embeddings": 33,
            "pad_token_id": 0,
        }
        sizes = {k: v for k, v in (sizes | fields).items() if v is not None}
        return hf(f"{family}ForCausalLM", config or f"{family}Config", **sizes), tokens(mask=mask)

    return build


def encoder(model: str, config: str, mask: bool = False, **fields: Any) -> Callable[[], Built]:
    """An encoder in the manner of BERT: 3 heads of 16 channels."""

    def build() -> Built:
        sizes = {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "vocab_size": 101,
            "max_position_embeddings": 33,
        }
        return hf(model, config, **(sizes | fields)), tokens(mask=mask)

    return build


def vision(model: str, config: str, size: int = 32, **fields: Any) -> Callable[[], Built]:
    """An image model in the manner of ViT: 3 heads of 16 channels, 8 x 8 patches of 32 x 32 images."""

    def build() -> Built:
        sizes = {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": size,
            "patch_size": 8,
        }
        return hf(model, config, **(sizes | fields)), pixels(size)

    return build


def other(model: str, config: str, inputs: Callable[[], dict[str, Any]], **fields: Any) -> Callable[[], Built]:
    return lambda: (hf(model, config, **fields), inputs())


_CLIP_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 101,
    "max_position_embeddings": 33,
    "eos_token_id": 2,
}
_CLIP_VISION = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _two_towers(length: int = 9) -> dict[str, Any]:
    return {**tokens(length), **pixels()}


def _audio() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 700, generator=torch.Generator().manual_seed(0))}


def _whisper() -> dict[str, Any]:
    noise = torch.randn(2, 11, 26, generator=torch.Generator().manual_seed(0))
    return {"input_features": noise, "decoder_input_ids": tokens(7)["input_ids"]}


def _translation(mask: bool = False) -> dict[str, Any]:
    return {**tokens(mask=mask), "decoder_input_ids": tokens(7)["input_ids"]}


def deformable_detr() -> Built:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=10, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    )
    model = hf(
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_feature_levels=2,
        d_model=64,  # in 32 groups
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=3,
        decoder_n_points=2,
        encoder_ffn_dim=80,
        decoder_ffn_dim=72,
        num_queries=7,
        num_labels=5,
    )
    return model, pixels(64)


def rt_detr() -> Built:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=10,
        hidden_sizes=[12, 16, 20, 28],
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    model = hf(
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 20, 28],
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=40,
        d_model=64,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=2,
        decoder_attention_heads=4,  # not 3: that many levels there are, and a class in which both are 3 is grafted
        decoder_n_points=2,
        decoder_ffn_dim=44,
        num_queries=7,
        num_labels=5,
        num_denoising=0,
        anchor_image_size=None,
    )
    return model, pixels(64)


def detr() -> Built:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=10, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    model = hf(
        "DetrForObjectDetection",
        "DetrConfig",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=80,
        decoder_ffn_dim=72,
        num_queries=7,
        num_labels=5,
    )
    return model, pixels()


_BART = {
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
_T5 = {"vocab_size": 101, "d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 3}
_WAV2VEC2 = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "conv_dim": (20, 28),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 6,
    "vocab_size": 33,
    "mask_time_prob": 0.0,
}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 80, "vocab_size": 101, "n_positions": 33}
_ALBERT = {"embedding_size": 20, "num_hidden_groups": 1}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 17}
_NO_HEAD_DIM = {"head_dim": None}

TINY: dict[str, Callable[[], Built]] = {
    "bert": encoder("BertModel", "BertConfig"),
    "llama_odd": causal("Llama", head_dim=10),
    "bert_masked_lm": encoder("BertForMaskedLM", "BertConfig", mask=True, attn_implementation="eager"),
    "roberta": encoder("RobertaModel", "RobertaConfig", mask=True),
    "distilbert": other(
        "DistilBertModel", "DistilBertConfig", lambda: tokens(mask=True),
        dim=48, hidden_dim=80, n_layers=2, n_heads=3, vocab_size=101, max_position_embeddings=33,
    ),
    "albert": encoder("AlbertModel", "AlbertConfig", **_ALBERT),
    "deberta": encoder("DebertaModel", "DebertaConfig", mask=True, **_DISENTANGLED),
    "deberta_v2": encoder("DebertaV2Model", "DebertaV2Config", mask=True, position_buckets=7, **_DISENTANGLED),
    "electra": encoder("ElectraModel", "ElectraConfig", embedding_size=20),
    "mpnet": encoder("MPNetModel", "MPNetConfig"),
    "gpt2": other("GPT2LMHeadModel", "GPT2Config", tokens, **_GPT2),
    "gpt2_eager": other("GPT2LMHeadModel", "GPT2Config", lambda: tokens(mask=True), attn_implementation="eager", **_GPT2),
    "gpt_neox": causal("GPTNeoX", num_key_value_heads=None, head_dim=None, num_attention_heads=3),
    "gptj": other(
        "GPTJForCausalLM", "GPTJConfig", tokens,
        n_embd=48, n_layer=2, n_head=3, n_inner=80, rotary_dim=8, vocab_size=101, n_positions=33,
    ),
    "codegen": other(
        "CodeGenForCausalLM", "CodeGenConfig", tokens,
        n_embd=48, n_layer=2, n_head=4, n_inner=80, rotary_dim=8, vocab_size=101, n_positions=33,
    ),
    "opt": other(
        "OPTForCausalLM", "OPTConfig", lambda: tokens(mask=True),
        hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=3, vocab_size=101,
        max_position_embeddings=33, word_embed_proj_dim=20, pad_token_id=0,
    ),
    "bloom": other("BloomForCausalLM", "BloomConfig", tokens, hidden_size=48, n_layer=2, n_head=3, vocab_size=101),
    "falcon": other(
        "FalconForCausalLM", "FalconConfig", tokens,
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_kv_heads=3, new_decoder_architecture=True,
        ffn_hidden_size=80, vocab_size=101,
    ),
    "mpt": other("MptForCausalLM", "MptConfig", tokens, d_model=48, n_heads=4, n_layers=2, vocab_size=101, max_seq_len=33),
    "llama": causal("Llama"),
    "llama_eager": causal("Llama", mask=True, attn_implementation="eager"),
    "mistral": causal("Mistral", mask=True),
    "qwen2": causal("Qwen2", head_dim=None, hidden_size=72),
    "qwen3": causal("Qwen3"),
    "gemma": causal("Gemma"),
    "gemma2": causal("Gemma2"),
    "gemma3": causal("Gemma3", "Gemma3TextConfig"),
    "phi": causal("Phi", head_dim=None, hidden_size=96),
    "phi3": causal("Phi3", head_dim=None, hidden_size=72),
    "mixtral": causal("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral_batched": causal("Mixtral", num_local_experts=5, num_experts_per_tok=2, experts_implementation="batched_mm"),
    "cohere": causal("Cohere", head_dim=None, hidden_size=72),
    "olmo": causal("Olmo", head_dim=None, hidden_size=72),
    "stablelm": causal("StableLm", head_dim=None, hidden_size=96),
    "t5": other("T5ForConditionalGeneration", "T5Config", lambda: _translation(mask=True), **_T5),
    "t5_gated": other("T5Model", "T5Config", _translation, feed_forward_proj="gated-gelu", **_T5),
    "bart": other("BartForConditionalGeneration", "BartConfig", lambda: _translation(mask=True), **_BART),
    "whisper": other(
        "WhisperForConditionalGeneration", "WhisperConfig", _whisper,
        **{**_BART, "pad_token_id": 0}, num_mel_bins=11, max_source_positions=13, max_target_positions=33,
        decoder_start_token_id=1,
    ),
    "mamba": other(
        "MambaForCausalLM", "MambaConfig", tokens,
        hidden_size=24, state_size=7, num_hidden_layers=2, conv_kernel=4, expand=2, time_step_rank=5, vocab_size=101,
    ),
    "mamba2": other(
        "Mamba2ForCausalLM", "Mamba2Config", tokens,
        hidden_size=24, state_size=7, num_hidden_layers=2, expand=2, num_heads=6, head_dim=8, n_groups=2,
        chunk_size=8, vocab_size=101,
    ),
    "rwkv": other(
        "RwkvForCausalLM", "RwkvConfig", tokens,
        hidden_size=24, attention_hidden_size=24, intermediate_size=72, num_hidden_layers=2, vocab_size=101, use_cache=False,
        rescale_every=0,  # else its first forward in eval mode divides weights in place, which is refused
    ),
    "vit": vision("ViTForImageClassification", "ViTConfig", num_labels=5),
    "deit": vision("DeiTModel", "DeiTConfig"),
    "dinov2": vision("Dinov2Model", "Dinov2Config"),
    "swin": other("SwinForImageClassification", "SwinConfig", pixels, **_SWIN),
    "swinv2": other("Swinv2Model", "Swinv2Config", pixels, **_SWIN),
    "convnext": other("ConvNextModel", "ConvNextConfig", pixels, hidden_sizes=[12, 20], depths=[1, 2], num_stages=2),
    "mobilevit": other(
        "MobileViTModel", "MobileViTConfig", lambda: pixels(64),
        hidden_sizes=[24, 36, 48], neck_hidden_sizes=[6, 10, 14, 18, 22, 26, 34], num_attention_heads=3,
        num_hidden_layers=2, image_size=64,
    ),
    "segformer": other(
        "SegformerForSemanticSegmentation", "SegformerConfig", lambda: pixels(64),
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[12, 30], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[2, 3], mlp_ratios=[3, 2], decoder_hidden_size=20, num_labels=5,
    ),
    "detr": detr,
    "deformable_detr": deformable_detr,
    "rt_detr": rt_detr,
    "clip": other(
        "CLIPModel", "CLIPConfig", _two_towers, text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=20,
    ),
    "siglip": other("SiglipModel", "SiglipConfig", _two_towers, text_config=_CLIP_TEXT | {"projection_size": 40}, vision_config=_CLIP_VISION),
    "wav2vec2": other("Wav2Vec2ForCTC", "Wav2Vec2Config", _audio, **_WAV2VEC2),
    "hubert": other("HubertModel", "HubertConfig", _audio, do_stable_layer_norm=True, feat_extract_norm="layer", **_WAV2VEC2),
}  # fmt: skip
