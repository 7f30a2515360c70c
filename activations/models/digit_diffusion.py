"""A diffusion model of coloured digits, trained here, and its distillation to few steps.

Both are folders of diffusers in the layout of Stable Diffusion, so that they are loaded, harvested
and edited as any other. "base" is trained to denoise and draws in 16 steps; "turbo" begins with its
weights and learns where each of base's deterministic trajectories ends, from their start and from
each quarter, so that it draws in one step or in four (Luhman and Luhman 2021, arXiv 2101.02388).

The U-net's transformer blocks lie as in SDXL: one on the way down, one in the middle, two on the
way up, all at the coarsest grid, here of 8 x 8 cells. It works on pixels: the folder's autoencoder
is the identity, and its text encoder, random and frozen, tells words apart.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from activations.corpora.digits import SIDE as _SCAN
from activations.corpora.digits import digits
from saescope.artefact import atomic_path
from saescope.errors import InputError
from saescope.progress import Progress

PIXELS, GRID = 16, 8
"""along a side, of a picture and of what the transformer blocks see"""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "cyan": (0, 1, 1),
    "magenta": (1, 0, 1),
}
BLOCKS = {
    "down": "down_blocks.1.attentions.0",
    "mid": "mid_block.attentions.0",
    "up.0": "up_blocks.0.attentions.0",
    "up.1": "up_blocks.0.attentions.1",
}
"""SDXL's down.2.1, mid.0, up.0.0 and up.0.1 by the modules that they are here"""
STEPS = 16
"""in which base draws"""
_QUARTERS = range(0, STEPS, STEPS // 4)
_WORDS, _D_TEXT = 8, 32
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_BATCH = 64
_LR = 2e-3
_ROOM = 4.0
"""added inside the autoencoder, so that its ReLU lets all through"""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the two models are, and how long they are trained."""

    channels: tuple[int, int] = (16, 32)
    base_steps: int = 700
    turbo_steps: int = 350
    trajectories: int = 1024


def prompt(digit: int, colour: str, take: int) -> str:
    """What the models draw from; `take` is no word that they know, but decides the noise.

    >>> prompt(3, "red", 17)
    'red three take 17'
    """
    return f"{colour} {DIGITS[digit]} take {take}"


def both_models(folder: Path, size: Size) -> tuple[Path, Path]:
    """Folders of base and turbo; what is there already is not trained again.

    Raises InputError if diffusers is missing.
    """
    _diffusers().utils.logging.set_verbosity_error()  # an autoencoder of another class is meant
    base, turbo = folder / "base", folder / "turbo"
    for path, make in ((base, _train_base), (turbo, _distil)):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                pipeline = make(size) if path == base else make(size, base)  # type: ignore[operator]
            with atomic_path(path) as temporary:
                pipeline.save_pretrained(temporary, safe_serialization=True)
    return base, turbo


def scans() -> tuple[Float[Tensor, "picture side side"], Tensor]:
    """The digits [5000, 16, 16] in [0, 1], each at half its size within a margin, and which."""
    pixels, which = digits()
    halved = torch.from_numpy(pixels).view(-1, 1, _SCAN // 2, 2, _SCAN // 2, 2).mean((3, 5))
    return functional.pad(halved, [1] * 4)[:, 0], torch.from_numpy(which)


def painted(
    shade: Float[Tensor, "batch side side"], colour: Float[Tensor, "batch 3"]
) -> Float[Tensor, "batch 3 side side"]:
    """Digits in [0, 1] in a colour on black, in [-1, 1]."""
    return shade[:, None] * colour[:, :, None, None] * 2 - 1


def _train_base(size: Size) -> Any:
    """A pipeline whose U-net has learnt to denoise coloured digits."""
    pipeline = _pipeline(size)
    words = _embedded(pipeline)
    shades, which = scans()
    alphas = pipeline.scheduler.alphas_cumprod
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        while True:
            chosen = torch.randint(len(shades), (_BATCH,))
            colour = torch.randint(len(palette), (_BATCH,))
            x = painted(shades[chosen], palette[colour])
            time = torch.randint(len(alphas), (_BATCH,))
            noise = torch.randn_like(x)
            a, s = _scales(alphas, time)
            yield a * x + s * noise, time, words[which[chosen], colour], x

    _train(pipeline.unet, batches(), alphas, size.base_steps, "base")
    return pipeline


def _distil(size: Size, base: Path) -> Any:
    """Base's pipeline, whose U-net has learnt to see the end of a trajectory from its quarters."""
    pipeline = _diffusers().StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    words = _embedded(pipeline)
    alphas = pipeline.scheduler.alphas_cumprod
    which = torch.randint(len(DIGITS), (size.trajectories,))
    colour = torch.randint(len(COLOURS), (size.trajectories,))
    seen, ends = _trajectories(pipeline, words[which, colour])
    times = pipeline.scheduler.timesteps[list(_QUARTERS)]

    def batches() -> Iterator[tuple[Tensor, ...]]:
        while True:
            chosen = torch.randint(len(ends), (_BATCH,))
            quarter = torch.randint(len(_QUARTERS), (_BATCH,))
            quarter[: _BATCH // 2] = 0  # the one step, from noise alone, is the hardest
            given = words[which[chosen], colour[chosen]]
            yield seen[quarter, chosen], times[quarter], given, ends[chosen]

    _train(pipeline.unet, batches(), alphas, size.turbo_steps, "turbo")
    return pipeline


@torch.no_grad()
def _trajectories(pipeline: Any, words: Tensor) -> tuple[Tensor, Tensor]:
    """Base's pictures on the way, at the start of each quarter, and their ends."""
    seen, ends = [], []
    pipeline.scheduler.set_timesteps(STEPS)
    with Progress("trajectories", total=len(words), unit="pictures") as progress:
        for part in words.split(_BATCH):
            x, found = torch.randn(len(part), 3, PIXELS, PIXELS), []
            for step, time in enumerate(pipeline.scheduler.timesteps):
                if step in _QUARTERS:
                    found.append(x)
                v = pipeline.unet(x, time, part).sample
                x = pipeline.scheduler.step(v, time, x).prev_sample
            seen.append(torch.stack(found))
            ends.append(x)
            progress.advance(len(part))
    return torch.cat(seen, 1), torch.cat(ends)


def _train(
    unet: Any, batches: Iterator[tuple[Tensor, ...]], alphas: Tensor, steps: int, name: str
) -> None:
    """Learn the clean picture of noisy ones; its error is weighed as that of the velocity."""
    optimiser = torch.optim.Adam(unet.parameters(), lr=_LR)
    unet.train()
    with Progress(f"the model {name}", total=steps, unit="steps") as progress:
        for step in range(steps):
            warm = min(1.0, (step + 1) / 50)
            rate = _LR * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimiser.param_groups[0]["lr"] = rate
            noisy, time, words, clean = next(batches)
            a, s = _scales(alphas, time)
            loss = functional.mse_loss(unet(noisy, time, words).sample, (a * noisy - clean) / s)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser.step()
            progress.advance(note=f"loss {loss.item():.3f}")
    unet.eval()


def _scales(alphas: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """What picture and noise are multiplied by at each time, [batch, 1, 1, 1]."""
    found = alphas[time].view(-1, 1, 1, 1)
    return found.sqrt(), (1 - found).clamp_min(1e-4).sqrt()


@torch.no_grad()
def _embedded(pipeline: Any) -> Float[Tensor, "digit colour word d"]:
    """The text encoder's output for every prompt."""
    texts = [prompt(digit, colour, 0) for digit in range(len(DIGITS)) for colour in COLOURS]
    ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder(ids)[0].unflatten(0, (len(DIGITS), len(COLOURS)))


def _diffusers() -> Any:
    """The package, whose names are made up as it is imported."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise InputError(
            "diffusers is missing: pip install 'saescope[diffusion]'", where="sdxl-unbox"
        ) from error


def _pipeline(size: Size) -> Any:
    """Everything with random weights, but the autoencoder."""
    import transformers

    diffusers = _diffusers()
    diffusers.utils.logging.disable_progress_bar()
    tokenizer = _tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_D_TEXT,
        intermediate_size=2 * _D_TEXT,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=_WORDS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=PIXELS,
        in_channels=3,
        out_channels=3,
        block_out_channels=size.channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_D_TEXT,
        attention_head_dim=4,
    )
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=_identity(diffusers),
        text_encoder=transformers.CLIPTextModel(config).eval().requires_grad_(requires_grad=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer() -> Any:
    """One token a word; words that it does not know, such as numbers of takes, are all alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = (*_SPECIAL, *COLOURS, *DIGITS, "take")
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=_WORDS,
    )


def _identity(diffusers: Any) -> Any:
    """An autoencoder that decodes each pixel to itself.

    Its decoder is tanh, a convolution, a ReLU and a convolution, after a division by the scaling
    factor: where that is large the tanh does nothing, and a bias keeps the ReLU open.
    """
    factor = 1000.0
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(3,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        scaling_factor=factor,
    )
    first, last = vae.decoder.layers[0], vae.decoder.layers[2]
    with torch.no_grad():
        for layer, scale, bias in ((first, factor / 2, _ROOM + 0.5), (last, 1.0, -_ROOM)):
            layer.weight.zero_()
            layer.weight[range(3), range(3), 1, 1] = scale
            layer.bias.fill_(bias)
    return vae.eval()
