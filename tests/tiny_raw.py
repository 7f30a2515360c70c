"""Tiny models of other kinds than language that the tests make: random weights, real layouts."""

import importlib
from pathlib import Path
from typing import Any

import torch

from tests.tiny import SENTENCES

D_MODEL = 32


def make_tokenizer(folder: Path) -> Any:
    """A byte-level tokenizer that puts [CLS] and [SEP] around a text, and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def random_weights(config: Any, seed: int = 0) -> Any:
    """A model of a transformers configuration, with weights large enough to matter."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_tiny_encoder(folder: Path) -> Path:
    """A BERT of 2 layers, width 32, 64 positions, as a Hugging Face folder."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    random_weights(config).save_pretrained(folder)
    return folder


def make_tiny_vit(folder: Path) -> Path:
    """A vision transformer of 2 layers over 4 x 4 patches and a class token, with its processor."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.ViTConfig(
        hidden_size=D_MODEL, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4,
    )  # fmt: skip
    random_weights(config).save_pretrained(folder)
    _save_processor(folder, 16)
    return folder


def make_tiny_resnet(folder: Path) -> Path:
    """A residual network: 32 pixels become 8 x 8 places of 8 channels, then 4 x 4 of 12."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    random_weights(config).save_pretrained(folder)
    _save_processor(folder, 32)
    return folder


def _save_processor(folder: Path, pixels: int) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": pixels, "width": pixels})
    processor.save_pretrained(folder)


def make_pictures(folder: Path, count: int = 10) -> str:
    """PNG files of random pictures of different sizes; a pattern for them."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    for number in range(count):
        shape = (20 + number, 30 - number, 3)
        picture = Image.fromarray(chance.integers(0, 256, shape, np.uint8))
        picture.save(folder / f"picture{number:02}.png")
    return str(folder / "*.png")


def make_tiny_pipeline(folder: Path) -> Path:
    """A Stable Diffusion of a few channels: latents of 8 x 8, prompts of up to 16 tokens."""
    import transformers

    diffusers: Any = importlib.import_module("diffusers")  # its names are made up as it is imported
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder.with_name("tokenizer-of-" + folder.name))
    tokenizer.model_max_length = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=D_MODEL,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        text_encoder = transformers.CLIPTextModel(config)
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def make_tiny_clip(folder: Path) -> Path:
    """Both towers of a CLIP model, as the hub's folders have them, with its pictures' processor."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    towers = {
        "hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**towers, "vocab_size": 50},
        vision_config={**towers, "image_size": 16, "patch_size": 4},
    )
    random_weights(config).save_pretrained(folder)
    _save_processor(folder, 16)
    return folder


def make_tiny_xl_pipeline(folder: Path) -> Path:
    """An SDXL of a few channels: its blocks by SDXL's names; latents of the pictures' size."""
    import transformers

    diffusers: Any = importlib.import_module("diffusers")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder.with_name("tokenizer-of-" + folder.name))
    tokenizer.model_max_length = 16
    kept: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 16,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32, attention_head_dim=4, transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4,
        )  # fmt: skip
        text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**kept))
        other = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**kept))
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=text_encoder, text_encoder_2=other, tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder
