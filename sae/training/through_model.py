"""Streams of runs whose reconstruction goes through the model: end to end, or in a KL finish."""

from collections.abc import Callable, Sequence
from functools import partial

from activations import ActivationStore
from activations.loading.epoch_order import Order
from activations.loading.outliers import OutlierFilter
from sae.architectures import architecture
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.batch import RawBatch, TrainingBatch
from sae.data.harvests import load_harvested_model
from sae.data.streams import Stream
from sae.training import process_group
from sae.training.config import TrainConfig
from sae.training.end_to_end import EndToEnd, EndToEndConfig, SequenceRows
from sae.training.end_to_end_stream import EndToEndStream
from sae.training.finish import FinishStream
from saescope.errors import InputError


def stream_through_model(
    config: TrainConfig,
    harvest: ActivationStore,
    sites: Sequence[str],
    *,
    seed: int,
    order: Order | None,
) -> EndToEndStream | FinishStream:
    """The batches of a run that is end to end, or has a finish that is.

    The model is loaded here, so that a run that will need it does not begin without it. Raises
    InputError if there is none, or if the run has settings that leave a sequence's rows or their
    loss other than one site's, whole.
    """
    if config.finish.objective is None:
        end_to_end = _end_to_end(config, harvest, sites, config.end_to_end, where="objective")
        return EndToEndStream(
            harvest,
            end_to_end,
            batch_size=config.trainer.batch_size,
            seed=seed,
            outliers=_outliers(config, harvest, sites),
        )
    total_steps = int(config.passes * harvest.n_rows("train") / config.trainer.batch_size)
    steps = config.finish.steps(total_steps, config.trainer.batch_size)
    _check_finish(config)
    terms = EndToEndConfig(sequences_at_once=config.finish.sequences_at_once)
    end_to_end = _end_to_end(config, harvest, sites, terms, where="finish.objective")
    return FinishStream(
        harvest,
        end_to_end,
        first_batches=total_steps - steps,
        batch_size=config.trainer.batch_size,
        seed=seed,
        mix_chunks=config.mix_chunks,
        order=order,
        outliers=_outliers(config, harvest, sites),
    )


def loss_through_model(
    stream: Stream, sae: SparseAutoencoder
) -> Callable[[RawBatch, TrainingBatch], TrainingBatch] | None:
    """What gives a stream's batches their loss; None for a stream that is all stored rows."""
    if not isinstance(stream, EndToEndStream | FinishStream):
        return None
    return partial(_with_loss, stream.end_to_end, sae)


def _with_loss(
    end_to_end: EndToEnd, sae: SparseAutoencoder, raw: RawBatch, batch: TrainingBatch
) -> TrainingBatch:
    return end_to_end.batch(sae, raw, batch) if isinstance(raw, SequenceRows) else batch


def _outliers(
    config: TrainConfig, harvest: ActivationStore, sites: Sequence[str]
) -> OutlierFilter | None:
    if config.outliers is None:
        return None
    return OutlierFilter.fit(harvest, sites, config.outliers)


def _end_to_end(
    config: TrainConfig,
    harvest: ActivationStore,
    sites: Sequence[str],
    terms: EndToEndConfig,
    *,
    where: str,
) -> EndToEnd:
    """The loss of one site, with the harvest's own model."""
    site, *others = sites
    beside = others or config.target_site or config.lens or config.mix_layers
    if beside or architecture(kind_of(config.sae)).concatenates:
        raise InputError("end-to-end training is of one site's SAE", where=where, given=sites)
    finish = config.finish.objective is not None
    if config.order is not None and not finish:
        raise InputError(
            "end-to-end training reads whole sequences, in an order of its own",
            where="order",
            given=config.order,
            allowed="leave it out",
        )
    process_group.refuse_together("end-to-end training", where=where)
    if config.device != "cpu":
        raise InputError(
            "end-to-end training goes through the model on the CPU",
            where="device",
            given=config.device,
            allowed="cpu",
        )
    model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
    return EndToEnd(model, site, terms, balanced=finish)


def _check_finish(config: TrainConfig) -> None:
    """Raise InputError for settings that the finish would stumble over at the end of a run."""
    loss = config.trainer.loss
    odd = {
        "objective": config.objective != "reconstruction" and config.objective,
        "trainer.accumulate": config.trainer.accumulate > 1 and config.trainer.accumulate,
        "trainer.loss.tilt": loss.tilt,
        "trainer.loss.visible_fraction": loss.visible_fraction < 1 and loss.visible_fraction,
        "sae.kind": (config.sae.needs_labels or config.sae.needs_neighbours)
        and "needs documents or neighbouring tokens",
    }
    for where, given in odd.items():
        if given:
            raise InputError(
                "does not go with a finish, which takes whole batches of sequences and has a loss "
                "of its own",
                where=where,
                given=given,
                allowed="leave it out, or leave out finish",
            )
