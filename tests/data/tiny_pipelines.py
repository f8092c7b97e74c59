"""Diffusers pipelines small enough to make on the spot, with random weights and tokenizers of a few words."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["a", "red", "blue", "green", "square", "circle", "of", "big", "small"]
SIZE = 16  # of the pictures; latents are 8×8


def clip_tokenizer(folder: Path):
    """Byte-pair encoding whose pieces are single letters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            pieces[:2] = ["".join(merge)]
            if " ".join(merge) not in merges:
                merges.append(" ".join(merge))
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=7)


def word_tokenizer():
    """One token a word, as stand-in for T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=9
    )


def clip_text(projection: bool = False, vocabulary: int = 120, width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=vocabulary - 1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_text(width: int = 16):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def vae(**more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        **{"scaling_factor": 0.5, **more},
    ).eval()


def conditional_unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **{"cross_attention_dim": 16, **more},
    )


def stable_diffusion(folder: Path, seed: int = 0) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip_text(vocabulary=len(tokenizer)),
            tokenizer=tokenizer,
            unet=conditional_unet(),
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path, zeros: bool = True) -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
        StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.3),
            text_encoder=clip_text(vocabulary=len(tokenizer)),
            text_encoder_2=clip_text(projection=True, vocabulary=len(tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=conditional_unet(
                cross_attention_dim=32,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=12 + 6 * 4,
            ),
            scheduler=EulerDiscreteScheduler(),
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(2)
        PixArtAlphaPipeline(
            tokenizer=word_tokenizer(),
            text_encoder=t5_text(),
            vae=vae(),
            transformer=PixArtTransformer2DModel(
                sample_size=8,
                num_layers=1,
                patch_size=2,
                attention_head_dim=4,
                num_attention_heads=2,
                caption_channels=16,
                in_channels=4,
                cross_attention_dim=8,
                out_channels=8,
                norm_num_groups=2,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
            ),
            scheduler=DDIMScheduler(),
        ).save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path, t5: bool = True) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
        StableDiffusion3Pipeline(
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=word_tokenizer() if t5 else None,
            text_encoder=clip_text(projection=True, vocabulary=len(tokenizer)),
            text_encoder_2=clip_text(projection=True, vocabulary=len(tokenizer)),
            text_encoder_3=t5_text(40) if t5 else None,
            vae=vae(shift_factor=0.2, scaling_factor=1.5),
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=1,
                in_channels=4,
                num_layers=1,
                attention_head_dim=4,
                num_attention_heads=2,
                joint_attention_dim=40,
                caption_projection_dim=8,
                pooled_projection_dim=24,
                out_channels=4,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ).save_pretrained(folder)
    return folder


def flux(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(4)
        tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
        FluxPipeline(
            tokenizer=tokenizer,
            tokenizer_2=word_tokenizer(),
            text_encoder=clip_text(vocabulary=len(tokenizer)),
            text_encoder_2=t5_text(),
            vae=vae(shift_factor=0.1, scaling_factor=0.4),
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=[4, 4, 8],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ).save_pretrained(folder)
    return folder


def pixels(folder: Path) -> Path:
    """An unconditional pipeline without autoencoder."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder
