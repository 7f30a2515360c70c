"""The harvest: right rows, bounded memory, exact resume, one clear error for each bad input."""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import ActivationStore, CorpusConfig, HarvestConfig, Model, ModelConfig, harvest
from activations.harvesting import compute, plan, resume
from activations.storage import writer
from activations.storage.ledger import Ledger
from activations.storage.writer import HarvestWriter
from saescope import config as configuration
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.paths import local
from tests.damage import as_schema_1, assert_same_content, content
from tests.interrupt import Interrupt
from tests.tiny import N_CTX, make_tiny_corpus, make_tiny_model

SITES = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvest")
    make_tiny_model(folder / "model")
    make_tiny_corpus(folder, documents=40)
    return folder


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., HarvestConfig]:
    """A configuration of a small harvest of five train windows and two held-out ones."""

    def build(**fields: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(root / "model"), dtype="float32"),
            "corpus": CorpusConfig(source=str(root / "corpus.jsonl")),
            "sites": SITES,
            "out": str(tmp_path / "out"),
            "context": 16, "chunk_rows": 128, "window_chunks": 6, "batch_sequences": 8,
            "held_out_fraction": 0.2,
        }  # fmt: skip
        return HarvestConfig(**(settings | fields))

    return build


def test_both_splits_and_all_windows(make: Callable[..., HarvestConfig]) -> None:
    store = harvest(make())
    assert store.complete
    assert [window.split for window in store.windows] == ["train"] * 5 + ["held_out"] * 2
    assert store.manifest["sequences_per_window"] == 48
    planned = store.manifest["planned_sequences"]
    assert planned == {"train": int((store.split == 0).sum()), "held_out": (store.split == 1).sum()}
    for window, following in zip(store.windows, store.windows[1:], strict=False):
        assert following.first_chunk == window.first_chunk + len(window.chunks(128))
        assert following.first_sequence == window.first_sequence + window.sequences
    assert store.verify() > 0
    assert store.manifest["corpus"]["train"]["documents"] == 40 - int(
        store.manifest["corpus"]["held_out"]["documents"]
    )


def test_keep_leaves_out_the_first_position_and_special_tokens(
    make: Callable[..., HarvestConfig],
) -> None:
    store = harvest(make())
    tokens, keep = store.tokens[:], store.keep[:]
    special = np.isin(tokens, store.manifest["model"]["special_token_ids"])
    assert not keep[:, 0].any()
    assert (tokens[:, 0] == store.manifest["model"]["bos_token_id"]).all()
    assert special[:, 1:].any()
    assert np.array_equal(keep[:, 1:], ~special[:, 1:])


def test_no_document_is_in_both_splits(make: Callable[..., HarvestConfig]) -> None:
    store = harvest(make(held_out_fraction=0.5))
    document = store.document[:]
    assert not set(document[store.split == 0].flat) & set(document[store.split == 1].flat)


def test_max_tokens(make: Callable[..., HarvestConfig]) -> None:
    store = harvest(make(max_tokens=1605))
    assert store.n_tokens == 1600
    assert int((store.split == 1).sum()) == 20
    whole = harvest(make(max_tokens=10_000_000, out=make().out + "-whole"))
    assert 1600 < whole.n_tokens < 10_000_000
    assert np.array_equal(whole.tokens[:80], store.tokens[:80])


def test_context_without_bos_in_another_architecture(
    make: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "gpt2", "gpt2")
    store = harvest(make(model=ModelConfig(spec=str(model), dtype="bfloat16"), context=24))
    assert store.manifest["model"]["bos_token_id"] is None
    assert store.manifest["model"]["dtype"] == "bfloat16"
    assert store.context == 24
    assert not store.keep[:][:, 0].any()


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, Any] = {
        "context": 16, "chunk_rows": 128, "window_chunks": 6, "batch_sequences": 8,
        "held_out_fraction": 0.2, "sites": SITES,
    }  # fmt: skip
    config = HarvestConfig(
        model=ModelConfig(spec=str(root / "model"), dtype="float32"),
        corpus=CorpusConfig(source=str(root / "corpus.jsonl")),
        out=str(tmp_path_factory.mktemp("whole") / "out"),
        **settings,
    )
    return local(harvest(config).path)


STOPS = [
    # in the forward pass: first window, within the second, in the held-out part
    (Model, "capture", 3, KeyboardInterrupt()),
    (Model, "capture", 12, KeyboardInterrupt()),
    (Model, "capture", 30, KeyboardInterrupt()),
    # between a window's arrays and its list of documents; before the manifest; before the end
    (HarvestWriter, "_flush", 2, RuntimeError("killed")),
    (HarvestWriter, "_write_documents", 3, RuntimeError("killed")),
    (HarvestWriter, "_write_manifest", 1, RuntimeError("killed")),
    (HarvestWriter, "_write_manifest", 4, RuntimeError("killed")),
    (HarvestWriter, "finish", 1, RuntimeError("killed")),
]


@pytest.mark.parametrize(("owner", "name", "at", "error"), STOPS)
def test_resumed_after_any_interruption_the_store_is_the_same(
    make: Callable[..., HarvestConfig],
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    at: int,
    error: BaseException,
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        Interrupt(patch, owner, name, at, error)
        with pytest.raises(type(error)):
            harvest(config)
    begun = ActivationStore.open(config.out)
    assert not begun.complete
    begun.verify()
    # what a process killed while writing leaves behind
    torn = begun.path / "activations.zarr" / SITES[0] / "c" / "9.abc.partial"
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"torn")
    with monkeypatch.context() as patch:
        again = Interrupt(patch, Model, "capture", -1, error)
        harvest(config)
    batches = sum(-(-window.sequences // 8) for window in begun.windows)
    total = sum(-(-w.sequences // 8) for w in ActivationStore.open(uninterrupted).windows)
    widths = 2 if total > batches else 0  # one token is run for the width of each site
    assert again.calls == total - batches + widths
    assert_same_content(Path(config.out), uninterrupted)


def test_two_interruptions_in_a_row(
    make: Callable[..., HarvestConfig], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    for at in (12, 14):
        with monkeypatch.context() as patch:
            Interrupt(patch, Model, "capture", at, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                harvest(config)
    assert 1 < len(ActivationStore.open(config.out).windows) < 5
    harvest(config)
    assert_same_content(Path(config.out), uninterrupted)


def test_a_complete_harvest_returns_at_once(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = harvest(make())
    before = content(first.path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded a model for nothing")

    monkeypatch.setattr(resume, "load_model", fail)
    assert harvest(make()).hash == first.hash
    assert content(first.path) == before


def test_another_configuration_is_refused_and_the_field_named(
    make: Callable[..., HarvestConfig], root: Path
) -> None:
    harvest(make())
    corpus = CorpusConfig(source=str(root / "corpus.jsonl"), title_field="name")
    for fields, message in (
        ({"context": 12}, r"context is 16 there and 12 here"),
        ({"sites": SITES[:1]}, "sites is"),
        ({"corpus": corpus}, r"corpus\.title_field is 'title' there and 'name' here"),
    ):
        with pytest.raises(InputError, match=message):
            harvest(make(**fields))


def test_a_changed_corpus_or_model_is_refused(
    make: Callable[..., HarvestConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_tiny_corpus(tmp_path, documents=40)
    model = make_tiny_model(tmp_path / "model")
    config = make(
        corpus=CorpusConfig(source=str(corpus)),
        model=ModelConfig(spec=str(model), dtype="float32"),
    )
    with monkeypatch.context() as patch:
        Interrupt(patch, Model, "capture", 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    text = corpus.read_text()
    corpus.write_text(text.replace("bridge", "tunnel"))
    with pytest.raises(ArtefactError, match="the corpus has changed"):
        harvest(config)
    corpus.write_text(text)
    make_tiny_model(model, seed=1)
    with pytest.raises(InputError, match="weights_hash differs"):
        harvest(config)


def test_the_precision_is_pinned_for_a_resume(
    make: Callable[..., HarvestConfig], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(model=ModelConfig(spec=str(root / "model")))
    with monkeypatch.context() as patch:
        patch.setattr("activations.models.load.resolve_dtype", lambda *_: "bfloat16")
        Interrupt(patch, Model, "capture", 12, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    asked = []
    original = resume.load_model

    def note(*args: Any, **kwargs: Any) -> Model:
        asked.append(kwargs["dtype"])
        return original(*args, **kwargs)

    monkeypatch.setattr(resume, "load_model", note)
    harvest(config)
    assert asked == ["bfloat16"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_is_one_clear_error_and_resumable(
    make: Callable[..., HarvestConfig],
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        Interrupt(patch, HarvestWriter, "_write_chunk", 5 * call, OSError(errno.ENOSPC, "full"))
        with pytest.raises(ArtefactError, match=r"disk is full.*goes on"):
            harvest(config)
    ActivationStore.open(config.out).verify()
    harvest(config)
    assert_same_content(Path(config.out), uninterrupted)


def test_a_disk_full_at_the_start_leaves_nothing(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("activations.storage.writer.create_arrays", full)
    with pytest.raises(ArtefactError, match="disk is full"):
        harvest(make())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"), [(errno.EDQUOT, "quota is used up"), (errno.EFBIG, "ulimit")]
)
def test_other_limits_of_a_disk(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    Interrupt(monkeypatch, HarvestWriter, "_write_chunk", 9, OSError(code, "limit"))
    with pytest.raises(ArtefactError, match=f"{message}.*goes on"):
        harvest(make())


def test_a_disk_full_at_any_file(
    make: Callable[..., HarvestConfig], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ledger, manifest, list of documents, description: nothing is half committed."""
    for owner, name, at in (
        (Ledger, "append", 2), (writer, "write_json", 20),
        (writer, "_write_manifest", 4), (writer, "write_documents", 5),
        (writer, "fsync_path", 100),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            Interrupt(patch, owner, name, at, OSError(errno.ENOSPC, "full"))
            with pytest.raises(ArtefactError, match="disk is full"):
                harvest(make(out=f"{make().out}-{name}"))
        ActivationStore.open(f"{make().out}-{name}").verify()
        assert_same_content(harvest(make(out=f"{make().out}-{name}")).path, uninterrupted)


def test_a_second_process_is_refused_at_once(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded a model for nothing")

    with locked(config.out, "harvest"), monkeypatch.context() as patch:
        patch.setattr(resume, "load_model", fail)
        with pytest.raises(ArtefactError, match=f"out: in use by harvest, process {os.getpid()}"):
            harvest(config)
    assert list(tmp_path.iterdir()) == []
    done = harvest(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with locked(config.out, "doctor"):  # a complete one is only read
        assert harvest(config).hash == done.hash


def test_what_a_killed_creation_left_is_removed(
    make: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    (tmp_path / ".out.abcd1234" / "out").mkdir(parents=True)
    (tmp_path / ".out.abcd1234" / "out" / "half").write_text("x")
    (tmp_path / ".out.precious").mkdir()
    (tmp_path / ".out.precious" / "replaced").write_text("the only copy")
    harvest(make())
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.precious"}


def test_an_unfinished_older_store_goes_on(
    make: Callable[..., HarvestConfig], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    with monkeypatch.context() as patch:
        Interrupt(patch, Model, "capture", 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    as_schema_1(Path(config.out))
    harvest(config)
    assert_same_content(Path(config.out), uninterrupted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sites": ("blocks.1.hook_resid_pots",)}, r"no such site.*blocks\.1\.hook_resid_post"),
        ({"sites": ("blocks.7-9.hook_resid_post",)}, "no site of this model matches"),
        ({"model": ModelConfig(spec="./no/such/model")}, "no such model folder"),
        ({"context": 1}, f"context: too short.*2 to {N_CTX}"),
        ({"context": N_CTX + 1}, f"context: longer than the context of model.*2 to {N_CTX}"),
        ({"corpus": CorpusConfig(source="nowhere/*.txt")}, "no such file"),
        ({"context": 64, "chunk_rows": 10, "window_chunks": 6}, "chunk_rows.*at least 11"),
    ],
)
def test_bad_input_writes_nothing(
    make: Callable[..., HarvestConfig], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        harvest(make(**fields))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_tokens", [None, 1600])
def test_an_empty_corpus_writes_nothing(
    make: Callable[..., HarvestConfig], tmp_path: Path, max_tokens: int | None
) -> None:
    source = tmp_path / "corpus.jsonl"
    for text, message in (("", "has no text"), ("few", "not enough text")):
        source.write_text(json.dumps({"text": text}))
        corpus = CorpusConfig(source=str(source))
        with pytest.raises(InputError, match=message):
            harvest(make(corpus=corpus, max_tokens=max_tokens, held_out_fraction=0.0))
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_with_other_things_is_left_alone(
    make: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no harvest"):
        harvest(make())
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_activations_that_are_not_finite_are_refused(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Model.capture

    def overflowing(self: Model, tokens: torch.Tensor, sites: Any) -> dict[str, torch.Tensor]:
        return {site: x / 0 for site, x in original(self, tokens, sites).items()}

    monkeypatch.setattr(Model, "capture", overflowing)
    with pytest.raises(InputError, match=r"not finite.*model\.dtype"):
        harvest(make())


def test_a_window_shrinks_to_fit_in_memory(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_WINDOW_BYTES", 2 * 128 * 64 * 2)
    store = harvest(make())
    assert store.manifest["window_chunks"] == 2
    assert max(window.rows for window in store.windows) <= 256
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 127 * 64 * 2)
    with pytest.raises(InputError, match=r"does not fit in memory.*up to 127"):
        harvest(make(out=make().out + "-2"))


def test_at_most_two_windows_are_in_memory(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = 0, 0
    run, write = compute.run_window, HarvestWriter.write

    def counted_run(*args: Any, **options: Any) -> Any:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return run(*args, **options)

    def counted_write(self: HarvestWriter, data: Any) -> None:
        nonlocal alive
        write(self, data)
        alive -= 1

    monkeypatch.setattr(compute, "run_window", counted_run)
    monkeypatch.setattr(HarvestWriter, "write", counted_write)
    harvest(make())
    assert (alive, most) == (0, 2)


def test_ranges_of_the_configuration(make: Callable[..., HarvestConfig]) -> None:
    for fields in (
        {"sites": ()},
        {"out": ""},
        {"context": 0},
        {"batch_memory": 0.0},
        {"batch_memory": 1.0, "batch_sequences": 8},
        {"held_out_fraction": 1.0},
        {"batch_sequences": 0},
        {"chunk_rows": 0},
        {"window_chunks": 0},
        {"max_tokens": 3},
        {"seed": -1},
    ):
        with pytest.raises(InputError, match=next(iter(fields))):
            make(**fields)


def test_the_configurations_that_come_with_saescope_load() -> None:
    folder = Path(__file__).parents[2] / "configs" / "harvest"
    loaded = {path.stem: configuration.load(HarvestConfig, path) for path in folder.glob("*.toml")}
    default = loaded["smollm2-135m-wikipedia"]
    assert default == HarvestConfig(max_tokens=default.max_tokens)
    assert {"gpt2-small", "pythia-70m", "pythia-160m", "gemma-2-2b", "llama-3.2-1b"} < loaded.keys()
    assert len({config.out for config in loaded.values()}) == len(loaded)
    kinds = {config.model.kind for config in loaded.values()}
    assert kinds == {"language", "text_encoder", "vision", "diffusion"}
    for name, config in loaded.items():
        assert Path(config.out).parts[0] == "data"
        packaged = config.model.spec == default.model.spec
        if not packaged and config.model.kind == "language":
            assert all(member.is_streamed for member in config.corpus.members), name
            assert config.max_tokens is not None, name
    with pytest.raises(InputError, match="contxt"):
        configuration.from_dict(HarvestConfig, {"contxt": 3}, "test")
    assert dataclasses.is_dataclass(HarvestConfig)
