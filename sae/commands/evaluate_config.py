"""Settings of `saescope eval`."""

from dataclasses import dataclass, field

from sae.evaluation import CORE
from sae.probing.config import ProbingConfig
from sae.probing.first_letter import AbsorptionConfig
from sae.probing.removal_config import SCRConfig, TPPConfig
from sae.probing.unlearning_config import UnlearningConfig
from sae.ravel.config import RavelConfig
from saescope.config import Config
from saescope.errors import check_range

QUICK_ROWS, QUICK_TOKENS = 4096, 2048
"""the most that `quick` measures"""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Measure an SAE on the held-out part of a harvest."""

    run: str
    """Folder of a trained run or of an SAE, in any known format, or its URL: s3://bucket/name,
    hf://owner/repo/folder."""
    harvest: str | None = None
    """Folder of the harvest to measure on; the one it was trained on if not given."""
    site: str | None = None
    """Of an SAE of several layers, the one to measure at (without it FVU and the like are measured
    at all, and the model's loss is not); of a crosscoder, the only site to replace in the model;
    of someone else's SAE, where it reads, if its files do not say."""
    target_site: str | None = None
    """Where someone else's transcoder writes, if its files do not say."""
    rows: int | None = None
    """Held-out activation rows for L0, FVU and the like; all of them if not given."""
    tokens: int = 8192
    """Held-out tokens that the model is run on for delta CE and KL; 0 leaves these out."""
    batch: int = 4
    """Sequences a run of the model."""
    suite: tuple[str, ...] = (CORE,)
    """Suites of families to measure: core (what is above), probing (how well features tell labels
    of texts), absorption (of first letters of words), ravel (how well features change one
    attribute of an entity and leave the others), scr and tpp (removal of a concept from probes,
    with an audit's warning), unlearning (by clamping, with side effects); several by commas, as in
    core,probing."""
    quick: bool = False
    """A look in a few minutes: at most 4,096 rows and 2,048 tokens, and of suites that look at
    training rows, or have texts of their own, at fewer of these."""
    metrics: tuple[str, ...] = ()
    """Families of metrics to measure (density, reconstruction, downstream, and those of plug-ins);
    all that apply if not given. The evaluation then has these alone."""
    allow_other_model: bool = False
    """Measure on a harvest of another model than the SAE was trained on."""
    out: str | None = None
    """File or URL to write; if not given, evaluation.json in the run's folder, and for an SAE on
    the hub OWNER--REPO--FOLDER.evaluation.json here."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""
    replace: bool = False
    """Write in the place of an evaluation that is there and says something else."""
    probing: ProbingConfig = field(default_factory=ProbingConfig)
    """How labelled texts are probed."""
    absorption: AbsorptionConfig = field(default_factory=AbsorptionConfig)
    """Which words absorption is measured on."""
    ravel: RavelConfig = field(default_factory=RavelConfig)
    """Which attributes of which entities are changed."""
    scr: SCRConfig = field(default_factory=SCRConfig)
    """Which texts spurious correlation removal is measured on."""
    tpp: TPPConfig = field(default_factory=TPPConfig)
    """Which texts targeted probe perturbation is measured on."""
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    """Which texts are to be forgotten, and how features are clamped."""

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_range("rows", self.rows, low=1)
        check_range("tokens", self.tokens, low=0)
        check_range("batch", self.batch, low=1)

    @property
    def most_rows(self) -> int | None:
        """The most held-out rows that are measured; None: all of them."""
        if not self.quick:
            return self.rows
        return QUICK_ROWS if self.rows is None else min(self.rows, QUICK_ROWS)

    @property
    def most_tokens(self) -> int:
        """The most held-out tokens that the model is run on."""
        return min(self.tokens, QUICK_TOKENS) if self.quick else self.tokens
