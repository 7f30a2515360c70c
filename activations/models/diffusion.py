"""Diffusion models: a sequence is a prompt at one denoising step, a position one of a feature map.

The sites are modules of the U-net (or transformer) that denoises; all around it (prompts, noise,
schedule) is done by the model's own pipeline of diffusers.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from activations.corpora.documents import Document
from activations.corpora.sequences import PLAIN, PackingCounts, PackingOptions, Sequences, grouped
from activations.models.config import DenoisingConfig
from activations.models.files import folder_of
from activations.models.foreign_code import loading
from activations.models.module_model import ModuleModel, check_positions
from activations.sites.grids import GridRun
from activations.sites.hooks import run_through
from saescope.artefact import sha256_file, sha256_json
from saescope.errors import InputError

_INDEX = "model_index.json"
_FILES = ("*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
Prompt = tuple[str, int, int]
"""A text, the seed of its noise, and the step that is read."""


def load_diffusion_model(
    spec: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    denoising: DenoisingConfig,
    *,
    trusted: bool = False,
) -> "DiffusionModel":
    """Load a pipeline of diffusers from text to picture. Raises InputError."""
    try:
        from diffusers import (  # pyright: ignore[reportMissingImports]
            DiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
        )
        from diffusers.utils import logging  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "diffusers is missing: pip install 'saescope[diffusion]'",
            where="model.kind",
            given="diffusion",
        ) from error
    files = (*_FILES, "*/*.py") if trusted else _FILES
    folder, commit = folder_of(
        spec, revision, described_by=_INDEX, hub_files=files, nested=True, with_code=trusted
    )
    logging.disable_progress_bar()
    with loading(spec, folder, "diffusion model", trusted=trusted):
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trusted,
        )
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionModel(pipeline.to(device), denoising, spec=spec, folder=folder, revision=commit)


class DiffusionModel(ModuleModel):
    """A pipeline from text to picture; its sites are modules of what denoises.

    A prompt has a sequence for each step that is read, one after the other. The noise that a
    prompt begins with follows from its text. `tokens` hold 31 bits of the sha256 of prompt and
    step, at each position.
    """

    kind = "diffusion"

    def __init__(
        self,
        pipeline: Any,
        denoising: DenoisingConfig,
        *,
        spec: str,
        folder: Path,
        revision: str | None = None,
    ) -> None:
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if denoiser is None:
            raise InputError(
                "this pipeline has neither a unet nor a transformer",
                where=spec,
                given=type(pipeline).__name__,
            )
        order = getattr(pipeline.scheduler, "order", 1)
        if order != 1:
            raise InputError(
                "this scheduler runs the model several times a step",
                where=spec,
                given=type(pipeline.scheduler).__name__,
                allowed="one of order 1, such as DDIM",
            )
        super().__init__(denoiser, spec=spec, folder=folder, revision=revision)
        self._pipeline, self._denoising = pipeline, denoising

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the weight files of all parts of the pipeline."""
        files = sorted(self.folder.glob("*/*.safetensors"))
        return sha256_json([[str(f.relative_to(self.folder)), sha256_file(f)] for f in files])

    def _hash_of_inputs(self) -> str:
        files = sorted([*self.folder.glob("tokenizer*/*"), *self.folder.glob("scheduler/*")])
        return sha256_json([[str(f.relative_to(self.folder)), sha256_file(f)] for f in files])

    @property
    def n_ctx(self) -> None:
        """No limit but the feature map."""

    def example(self, count: int, positions: int | None = None) -> list[Prompt]:
        """Empty prompts at the last step that is read."""
        del positions
        return [("", number, self._denoising.at[-1]) for number in range(count)]

    def _run(self, inputs: Sequence[Prompt]) -> object:
        """One pass of the denoiser, on the prompts alone."""
        return self._denoise(inputs, steps=1, guidance=0.0)

    def pictures(self, inputs: Sequence[Prompt]) -> Float[Tensor, "batch channel height width"]:
        """What prompts give at the end of all steps, in [0, 1], on the CPU, edits included."""
        steps, guidance = self._denoising.steps, self._denoising.guidance
        with torch.no_grad():
            found: Any = self._denoise(inputs, steps=steps, guidance=guidance, output="pt")
        return found.images.float().cpu()

    def _denoise(
        self, prompts: Sequence[Prompt], *, steps: int, guidance: float, output: str = "latent"
    ) -> object:
        size = self._denoising.pixels
        return self._pipeline(
            prompt=[text for text, _, _ in prompts],
            num_inference_steps=steps,
            guidance_scale=guidance,
            # one of each, so that a prompt's noise does not depend on its batch
            generator=[torch.Generator().manual_seed(seed) for _, seed, _ in prompts],
            output_type=output,
            **({} if size is None else {"height": size, "width": size}),
        )

    @property
    def pipeline(self) -> Any:
        """The pipeline of diffusers, to make pictures with: it runs the model that is edited."""
        return self._pipeline

    def _grid_run(self) -> GridRun:
        return GridRun(self.module, self._step)

    def _step(self, known: Mapping[str, Any]) -> int | None:
        """Which step a pass of the denoiser is, by the time it is given; None if unclear."""
        time, scheduler = known.get("timestep"), self._pipeline.scheduler
        if time is None or getattr(scheduler, "timesteps", None) is None:
            return None
        times = torch.as_tensor(scheduler.timesteps).double().cpu()
        now = torch.as_tensor(time).double().flatten()[0].cpu()
        whole = float(scheduler.config.get("num_train_timesteps", 1000))
        found = [(times == now).nonzero(), torch.isclose(times / whole, now).nonzero()]
        return next((int(each[0, 0]) for each in found if len(each) == 1), None)

    def capture(
        self, inputs: Sequence[Prompt], sites: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """Activations at the sites, of each prompt at its step; no later step is computed.

        Raises InputError for an unknown site.
        """
        targets = [self._sites.target(site) for site in sites]
        if not targets:
            return {}
        runs = {(text, seed): number for number, (text, seed) in enumerate(_runs(inputs))}
        prompts = [(text, seed, 0) for text, seed in runs]
        calls = sorted({step for _, _, step in inputs})
        steps, guidance = self._denoising.steps, self._denoising.guidance
        run: Callable[[], object] = lambda: self._denoise(prompts, steps=steps, guidance=guidance)  # noqa: E731
        with torch.no_grad():
            found = dict(zip(calls, run_through(targets, run, self.module, calls), strict=True))

        def of(site: str, text: str, seed: int, step: int) -> Tensor:
            x = found[step][site]
            return x[len(x) - len(prompts) + runs[text, seed]]  # with guidance, the second half

        return {site: torch.stack([of(site, *each) for each in inputs]) for site in sites}

    def sequences(
        self,
        documents: Iterable[Document],
        *,
        context: int,
        per_group: int,
        counts: PackingCounts,
        limit: int | None = None,
        packing: PackingOptions = PLAIN,
    ) -> Iterator[Sequences]:
        """See `HarvestModel.sequences`. Raises InputError for a prompt that would be cut off."""
        del packing
        entries = self._entries(documents)
        return grouped(entries, context=context, per_group=per_group, counts=counts, limit=limit)

    def _entries(self, documents: Iterable[Document]) -> Iterator[tuple[Document, str, Prompt]]:
        for document in documents:
            self._check_length(document)
            seed = int(hashlib.sha256(document.text.encode()).hexdigest()[:8], 16)
            for step in self._denoising.at:
                digest = hashlib.sha256(f"{document.text}\0{step}".encode()).hexdigest()
                yield document, digest, (document.text, seed, step)

    def _check_length(self, document: Document) -> None:
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self._pipeline, name, None)
            if tokenizer is None:
                continue
            length = len(tokenizer(document.text, verbose=False).input_ids)
            if length > tokenizer.model_max_length:
                raise InputError(
                    "a prompt has more tokens than the model reads",
                    where=document.key,
                    given=length,
                    allowed=f"up to {tokenizer.model_max_length}",
                )

    def inputs(self, group: Sequences, chosen: NDArray[np.int64]) -> list[Prompt]:
        """Prompts with their seeds and steps."""
        assert group.inputs is not None
        return [group.inputs[number] for number in chosen]

    def keep_mask(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Every position counts."""
        return torch.ones_like(tokens, dtype=torch.bool)

    def _check_site(self, site: str, rows: str, context: int) -> None:
        """Positions are those of the site's feature map; a mean has one."""
        check_positions(site, self.positions(site), rows, context)


def _runs(prompts: Sequence[Prompt]) -> Iterable[tuple[str, int]]:
    """Each text with its seed once, in order."""
    return dict.fromkeys((text, seed) for text, seed, _ in prompts)
