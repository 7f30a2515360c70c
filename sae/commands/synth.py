"""`saescope synth`: train architectures on a synthetic world, and score what they found."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sae.architectures import architecture
from sae.core.base import SparseAutoencoder, kind_of
from sae.evaluation.true_features import LABELS, score_true_features
from sae.formats.load import load
from sae.synthetic.config import PREFIX, world_config
from sae.synthetic.stream import SyntheticStream, world_hash
from sae.synthetic.world import World, named_world
from sae.training.config import TrainConfig
from sae.training.synthetic import SyntheticRun
from sae.training.trainer_config import TrainerConfig
from saescope.artefact import git_commit, library_versions, read_json, sha256_json, write_json
from saescope.config import Config, to_dict
from saescope.errors import InputError, check_range
from saescope.paths import local
from saescope.progress import say

SCORES = "scores.json"
SHOWN = (
    "l0",
    "f1",
    "mcc",
    "precision",
    "recall",
    "uniqueness",
    "explained_variance",
    "shrinkage",
    "dead_latents",
)
"""columns of the table"""
PUBLISHED = ("batchtopk", "matryoshka", "jumprelu", "relu", "matching_pursuit")
_WIDER, _SURVEYED = 4, 65_536
"""true features a latent, as published, and rows on which the true L0 is counted"""


def _trainer() -> TrainerConfig:
    return TrainerConfig(batch_size=1024, evaluate_every=1000, checkpoint_every=1000)


@dataclass(frozen=True, kw_only=True)
class SynthConfig(Config):
    """Train architectures on a world whose true features are known, and score them."""

    world: str = "small"
    """16k (SynthSAEBench-16k: 16,384 features, d_in 768), small (2,048, 192) or tiny (96, 32)."""
    out: str | None = None
    """Folder for the runs and scores.json; what is there already is gone on with. If not given,
    runs/synth-WORLD, and for `runs` runs/synth-WORLD-scores."""
    architectures: tuple[str, ...] = PUBLISHED
    """What to train."""
    runs: tuple[str, ...] = ()
    """Trained runs or SAEs, in any known format, to score instead of training any."""
    samples: int = 1_000_000
    """Rows to train each on; the published figures are of 200 million."""
    d_sae: int | None = None
    """Latents; a quarter of the true features, as published, if not given."""
    l0: float | None = None
    """L0 to reach; if not given, of the d_sae most frequent true features as many as fire on a row
    on average (25 in the 16k world), rounded."""
    seeds: tuple[int, ...] = (0,)
    """Each architecture is trained with each of these: other weights, other rows, the same
    world."""
    scored_rows: int = 500_000
    """Rows to score on, which are never trained on."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where SAEs are trained and scored."""
    trainer: TrainerConfig = field(default_factory=_trainer)
    """How each is trained; target_l0 is `l0`."""

    def __post_init__(self) -> None:
        world_config(self.world)
        for name in ("samples", "scored_rows"):
            check_range(name, getattr(self, name), low=1)
        for name in ("d_sae", "l0"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), above=0)
        for name in ("architectures", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InputError("each once, and at least one", where=name, given=given)
        for seed in self.seeds:
            check_range("seeds", seed, low=0)
        if self.trainer.target_l0 is not None:
            raise InputError("is given as l0", where="trainer.target_l0", allowed="leave it out")


def synth(config: SynthConfig) -> list[dict[str, Any]]:
    """Train, or read, and score; print a table and write scores.json. Returns its rows.

    An architecture whose scores are in the file already is not trained or scored again.

    Raises InputError if the folder has scores of another protocol, if an architecture needs more
    than rows, or if an SAE to score is of another width.
    """
    for name in () if config.runs else config.architectures:
        architecture(name)
    world = named_world(PREFIX + config.world)
    usual = f"runs/synth-{config.world}{'-scores' if config.runs else ''}"
    out = local(config.out or usual)
    chosen = _completed(config, world)
    protocol = _protocol(chosen, world)
    done = _done(out / SCORES, protocol)
    if not config.runs:
        say(
            f"{config.world}: {world.config.features:,} true features, d_in {world.config.d_in}; "
            f"{chosen.d_sae:,} latents, L0 {chosen.l0:g}, {config.samples:,} rows each"
        )
    found = []
    for name, make in _saes(chosen, world, out):
        if name not in done:
            done[name] = make()
            _write(out / SCORES, protocol, done)
        found.append({"run": name, **done[name]})
    for line in table(found):
        say(line)
    say(f"written to {out / SCORES}")
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of scores.

    >>> zeros = dict.fromkeys(SHOWN, 0.0)
    >>> table([{"run": "topk-0", **zeros, "f1": 0.5}])[1].split()[:3]
    ['topk-0', '0.00', '0.5000']
    """
    names = ["run", *(LABELS[name].label for name in SHOWN)]
    values = [[str(row["run"]), *(LABELS[name].shown(row[name]) for name in SHOWN)] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *values, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in (names, *values)
    ]


def frequent_l0(world: World, count: int) -> float:
    """How many of the first `count` true features fire on a row, on average."""
    codes = next(SyntheticStream(world, batch_size=1).scored(_SURVEYED, piece=_SURVEYED)).codes
    return float((codes.index < count).sum()) / codes.batch


def _completed(config: SynthConfig, world: World) -> SynthConfig:
    """With what was not given filled in."""
    d_sae = config.d_sae or max(1, world.config.features // _WIDER)
    l0 = config.l0 or (max(1, round(frequent_l0(world, d_sae))) if not config.runs else None)
    return replace(config, d_sae=d_sae, l0=l0)


def _protocol(config: SynthConfig, world: World) -> dict[str, Any]:
    """What must be equal for scores to be comparable."""
    settings = {"world": to_dict(world.config), "scored_rows": config.scored_rows}
    if not config.runs:
        names = ("samples", "d_sae", "l0")
        settings |= {name: getattr(config, name) for name in names}
        settings["trainer"] = to_dict(config.trainer)
    return {**settings, "hash": sha256_json(settings)}


def _done(path: Path, protocol: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores in a file, by run; none if there is no file."""
    if not path.exists():
        return {}
    found = read_json(path)
    if found["protocol"]["hash"] != protocol["hash"]:
        differing = [name for name in protocol if found["protocol"].get(name) != protocol[name]]
        raise InputError(
            f"holds scores of another protocol (differs in: {', '.join(differing[:-1])}); choose "
            "another out, or remove it",
            where=str(path.parent),
        )
    return {row.pop("run"): row for row in found["runs"]}


def _write(path: Path, protocol: Mapping[str, Any], done: Mapping[str, Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "protocol": protocol,
            "runs": [{"run": name, **scores} for name, scores in done.items()],
            "libraries": library_versions(),
            "commit": git_commit(),
        },
    )


def _saes(config: SynthConfig, world: World, out: Path) -> Iterator[tuple[str, Any]]:
    """The name of each SAE, and a function that trains or reads and scores it."""
    if config.runs:
        for path in config.runs:
            yield path, lambda path=path: _scored(config, world, load(path), seed=0)
        return
    for name in config.architectures:
        for seed in config.seeds:
            yield f"{name}-{seed}", lambda n=name, s=seed: _trained(config, world, out, n, s)


def _trained(config: SynthConfig, world: World, out: Path, name: str, seed: int) -> dict[str, Any]:
    """Train an architecture, if it is not trained yet, and score it."""
    kind = architecture(name).Config
    # k of the default may be more than the latents; the target then sets it exactly
    k = {"k": max(1, round(config.l0 or 1))} if "k" in {each.name for each in fields(kind)} else {}
    train = TrainConfig.specialise({"sae": {"kind": name}})(
        harvest=PREFIX + config.world,
        out=str(out / f"{name}-{seed}"),
        samples=config.samples,
        seed=seed,
        device=config.device,
        sae=kind(**{"d_sae": config.d_sae, **k}),
        trainer=replace(config.trainer, target_l0=config.l0),
    )
    run = SyntheticRun(train, world)
    with run.locked():
        if run.finished():
            return _scored(config, world, load(run.folder), seed=seed)
        run.start()
        begun, before = time.perf_counter(), run.trainer.step
        run.trainer.run()
        seconds = time.perf_counter() - begun
        rows = (run.trainer.step - before) * train.trainer.batch_size
        scores = _scored(config, world, run.release(), seed=seed)
    return {**scores, "rows_per_second": round(rows / max(seconds, 1e-9))}


def _scored(
    config: SynthConfig, world: World, sae: SparseAutoencoder, *, seed: int
) -> dict[str, Any]:
    """What an SAE scores on rows of the seed that are not trained on."""
    if (sae.d_in, sae.d_out) != (world.config.d_in, world.config.d_in):
        raise InputError(
            "an SAE of another width than the world",
            where="runs",
            given=f"{sae.d_in} to {sae.d_out}",
            allowed=str(world.config.d_in),
        )
    device = torch.device(config.device)
    stream = SyntheticStream(world, batch_size=1, seed=seed, device=device)
    sae = sae.to(device).eval()
    dictionary: Tensor = sae.W_dec.detach()
    found = score_true_features(
        sae, dictionary, world.directions.to(device), stream.scored(config.scored_rows)
    )
    return {
        "architecture": kind_of(sae.config),
        "seed": seed,
        "world": world_hash(world),
        "d_sae": sae.d_sae,
        "samples": sae.metadata.get("tokens_trained"),
        **asdict(found),
    }
