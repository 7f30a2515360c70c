"""How long the rest of the demo takes on this machine: the work left, and a short measurement.

Work is counted in tokens through the model and in floating-point operations of encoder products.
Their speed is measured; how many of them each step takes comes from recorded runs
(benchmarks/results/demo.csv).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saescope.paths import as_path
from store.database import STORE_FILE

if TYPE_CHECKING:
    from activations import HarvestConfig
    from sae.training.config import TrainConfig

WIDTH = 576
"""of the packaged model"""
_EVALUATED = 4 * 3.8
"""tokens that are harvested in the time of one that is evaluated, which goes four times through the
whole model and its vocabulary; the harvest ends at its site"""
_ENCODED = 0.5
"""of a row's product in training, what one takes in indexing"""
_STORED = 3.3e-5
"""seconds a row of the feature store, at 32 activations"""
_LOADING = 10.0
"""seconds to load the model, in each step after the harvest"""
_STEP = 1000
"""tokens that the length of a shortened harvest is a multiple of"""


@dataclass(frozen=True)
class Work:
    """Work that is left to do."""

    tokens: float
    """through the model as far as the site"""
    product: float
    """floating-point operations"""
    seconds: float
    """of work that takes about as long on all machines"""

    @property
    def is_little(self) -> bool:
        """Whether nothing is left that takes minutes."""
        return self.tokens == self.product == 0


@dataclass(frozen=True)
class Machine:
    """Speed of this machine, by a short measurement: amounts a second."""

    tokens: float
    """through the model as far as the site"""
    product: float
    """floating-point operations"""

    def seconds(self, work: Work) -> float:
        """Seconds that the work takes, about."""
        return work.seconds + work.tokens / self.tokens + work.product / self.product

    def minutes(self, work: Work) -> int:
        """Minutes that the work takes, about; at least 1.

        >>> Machine(2000.0, 1e11).minutes(Work(tokens=6e5, product=6e12, seconds=60.0))
        7
        """
        return max(1, round(self.seconds(work) / 60))

    def fitting(self, tokens: int, work: Work, seconds: float, *, fewest: int) -> int:
        """Tokens to harvest, in thousands and at most those given, for the work to take so long.

        Args:
            tokens: that the work is for, from the beginning; all but the loading is in proportion.
            seconds: that there are for the work.
            fewest: tokens that are harvested however long it takes.

        >>> work = Work(tokens=180_000, product=0, seconds=30)
        >>> [Machine(n, 1e11).fitting(150_000, work, 210, fewest=20_000) for n in (50, 600, 2000)]
        [20000, 90000, 150000]
        """
        each = (self.seconds(work) - 3 * _LOADING) / tokens
        fits = int((seconds - 3 * _LOADING) / each) // _STEP * _STEP
        return min(tokens, max(fits, fewest))


def work_left(
    harvesting: "HarvestConfig", training: "TrainConfig", store: str, evaluated: int
) -> Work:
    """The work that is not done yet; `evaluated` is the number of tokens of the evaluation.

    Raises InputError if the harvest's folder holds another harvest.
    """
    from activations.harvesting.resume import existing_harvest
    from sae.formats.hub import evaluation_file
    from sae.formats.load import SAE_FOLDER

    harvest = existing_harvest(harvesting, as_path(harvesting.out))
    planned = harvesting.max_tokens or 0
    there = 0 if harvest is None else planned if harvest.complete else harvest.n_tokens
    tokens, product, seconds = float(planned - there), 0.0, _LOADING
    run, row = Path(training.out), 2.0 * WIDTH * training.sae.d_sae
    if not (run / SAE_FOLDER).exists():
        product += training.passes * planned * row
    if not evaluation_file(run).exists():
        tokens += _EVALUATED * evaluated
        seconds += _LOADING
    if not (Path(store) / STORE_FILE).exists():
        product += _ENCODED * planned * row
        seconds += _STORED * planned + _LOADING
    return Work(tokens, product, seconds)


def tokens_before(harvesting: "HarvestConfig") -> int | None:
    """The tokens that a harvest in the folder was begun with; None if there is none."""
    from activations import ActivationStore
    from saescope.artefact import MANIFEST
    from saescope.paths import exists

    out = as_path(harvesting.out)
    if not exists(out / MANIFEST):
        return None
    return ActivationStore.open(out).manifest["config"]["max_tokens"]


def measured_here(harvesting: "HarvestConfig") -> Machine:
    """Run the model over some batches of the text, and multiply some matrices."""
    import torch

    from activations.harvesting.corpus_reader import CorpusReader
    from activations.harvesting.plan import measured, planned_facts
    from activations.harvesting.resume import existing_harvest, model_of
    from activations.models.matmul_precision import PRODUCT, seconds_of_product

    store = existing_harvest(harvesting, as_path(harvesting.out))
    model = model_of(harvesting, store)
    facts = planned_facts(harvesting, model) if store is None else store.manifest
    seconds, _ = measured(harvesting, facts, CorpusReader.of(harvesting), model)
    operations = 2.0 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]
    return Machine(1 / seconds, operations / seconds_of_product(torch.float32))
