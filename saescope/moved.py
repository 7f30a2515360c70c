"""Modules that have been moved: their old names can still be imported.

An old name gives the module of today, after one DeprecationWarning that says its name. Where a
module has been divided, its old name finds what it had in each of today's. Names that were changed
inside a module are not found under their old ones. All of this goes with version 0.2.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLE = """
activations.append .harvesting.append
activations.arrays .storage.arrays
activations.batch_size .models.forward_memory .harvesting.config
activations.begun .harvesting.resume
activations.bring .harvesting.bring
activations.bring_command .harvesting.bring_command
activations.chunk_files .storage.chunk_files
activations.command .harvesting.command
activations.diffusion .models.diffusion
activations.doctor .recompute.doctor
activations.encoders .models.text_encoder
activations.foreign_code .models.foreign_code
activations.harvest .harvesting.pipeline .harvesting.plan .harvesting.resume .harvesting.config
activations.head .models.unembedding
activations.hf_facts .sites.hf_facts
activations.hooks .sites.hooks
activations.images .corpora.pictures
activations.kept .sites.kept
activations.layout .storage.layout
activations.ledger .storage.ledger
activations.live .recompute.computed_rows
activations.loader .loading.loader .loading.unshuffled
activations.mapped_rows .storage.mmap_rows
activations.model_config .models.config
activations.model_facts .harvesting.resume
activations.model_files .models.files .models.devices
activations.model_names .models.names
activations.no_text .models.no_tokenizer
activations.normalised .sites.normalised
activations.outliers .harvesting.outliers
activations.packaged .models.packaged .models.hf
activations.packing .corpora.packing .corpora.sequences
activations.parts .harvesting.segments
activations.plan .harvesting.plan saescope.system
activations.products .models.matmul_precision
activations.ranks .harvesting.window_locks .models.devices .harvesting.workers
activations.raw_models .models.base .models.devices .corpora.sequences
activations.reading .harvesting.corpus_reader
activations.reading_order .loading.epoch_order
activations.repair .recompute.repair
activations.row_files .storage.row_files
activations.row_layout .storage.row_layout
activations.row_storage .storage.row_formats
activations.rows .harvesting.row_selection .harvesting.config
activations.sequence_array .storage.sequence_array
activations.site_map .sites.modules
activations.site_probe .sites.probe
activations.sources .corpora.sources
activations.staging .harvesting.staging
activations.store_check .storage.verify .storage.files
activations.tables .corpora.tables
activations.taking .loading.gather
activations.text .models.tokenizer .corpora.long_texts
activations.vision .models.vision
activations.windows .harvesting.windows .harvesting.compute
activations.zarr_store .storage.reader .storage.row_source
activations.zarr_writer .storage.writer .storage.window_data .storage.documents
dashboards.live .model_cache
dashboards.places .find_stores
sae.base .core.base .core.config
sae.batch .core.batch
sae.bench.command .commands.bench
sae.certificate .formats.certificate
sae.codes .kernels.codes
sae.contest .kernels.global_topk
sae.convert_command .commands.convert
sae.doctor .commands.doctor
sae.evaluation.command .commands.evaluate .evaluation.written
sae.examination .commands.examination
sae.expectations .data.model_expectations
sae.finite .core.finite
sae.gradients .core.gradients
sae.harvests .data.harvests
sae.inference .steering.text_features
sae.kernels.aten .kernels.torch_backend
sae.kernels.cpu .kernels.cpp_backend
sae.kernels.functions .kernels.autograd
sae.kernels.native .kernels.cpp_library
sae.kernels.optimiser .kernels.adam
sae.kernels.products .kernels.matmul
sae.kernels.reference .kernels.reference_backend
sae.kernels.spare .kernels.gradient_buffers
sae.kernels.totals .kernels.fixed_order_sums
sae.loading .formats.load
sae.normaliser .core.normaliser
sae.objectives .core.losses
sae.outputs .core.outputs
sae.provenance .data.provenance
sae.readings .formats.misreadings
sae.saved .core.serialisation
sae.sites .data.placement
sae.soundness .core.soundness
sae.steer_command .commands.steer
sae.steering.attribution .analysis.attention.attribution
sae.steering.sums .analysis.attention.sums
sae.training.command .commands.train .training.config
sae.training.controller .training.l0_controller
sae.training.labels .data.row_labels
sae.training.measuring .training.held_out
sae.training.objective .training.batch_maker
sae.training.outliers activations.loading.outliers
sae.training.plan .training.estimate
sae.training.ranks .training.process_group .training.gradient_sums .training.optimisers
sae.training.setup .training.run .analysis.lens .training.run_folder
sae.training.shards .training.sharded_checkpoint
sae.training.stream_base .data.stream_base
sae.training.streams .data.streams
sae.training.sweep .commands.sweep
sae.training.update .training.step
saescope.places .paths
saescope.ranks .process_rank
store.decoding .vocabulary
store.finishing .build .database
"""
MOVED: dict[str, list[str]] = {}
for _line in _TABLE.strip().splitlines():
    _old, *_new = _line.split()
    _package = _old.partition(".")[0]
    MOVED[_old] = [_package + each if each.startswith(".") else each for each in _new]
"""today's modules by old names; the first is the one that is given"""


def names_in(package: str, *modules: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: what a module of its name had, in today's modules."""

    def find(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            found = importlib.import_module(module)
            if hasattr(found, name):
                _warn(f"{package}.{name}", f"{module}.{name}", level=4)
                return getattr(found, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def _warn(old: str, new: str, level: int) -> None:
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=level)


class _Divided(ModuleType):
    """The old name of a module of which there are several today."""

    def __getattr__(self, name: str) -> Any:
        for module in () if name.startswith("__") else MOVED[self.__name__]:
            found = importlib.import_module(module)
            if hasattr(found, name):
                return getattr(found, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Finds old names, behind all that finds modules that are there."""

    def __init__(self) -> None:
        self._specs: dict[str, Any] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old name."""
        del path, target
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today."""
        new = MOVED[spec.name]
        _warn(spec.name, " and ".join(new), level=2)
        if len(new) > 1:
            return _Divided(spec.name)
        module = importlib.import_module(new[0])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it was executed under its own name, which it keeps."""
        spec = module.__spec__
        if spec is not None and spec.name in self._specs:
            module.__spec__ = self._specs.pop(spec.name)


def install() -> None:
    """Have old names found, once."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.append(_Finder())
