"""Measured effects and scores of steering of a store's features, against runs one by one."""

import csv
import dataclasses
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

import sae
from activations import ActivationStore, load_model
from activations.models.language import Model
from benchmarks import effects_time
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.bench import rows as results
from sae.commands.effects import EffectsConfig, measure_effects
from sae.commands.steer import SteerConfig, steer_text
from sae.indexing import effects as measuring
from sae.indexing.build import direct_logits
from sae.indexing.effect_plan import plan_effects
from sae.indexing.pending import pending_folder
from sae.steering.dose_result import SOURCES
from saescope.errors import InputError
from store import FeatureFilter, FeatureStore
from store.measured import EFFECTS, MEASURED_COLUMNS
from store.results import Between
from tests.older_stores import as_store_schema
from tests.tiny import make_tiny_harvest, make_tiny_model

NO_FEATURES = np.zeros(0, np.int64)
SITE, PROMPT, POSITIONS = "blocks.0.hook_resid_post", "The river rose", 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's store, without effects."""
    root = tmp_path_factory.mktemp("effects")
    make_tiny_harvest(root, make_tiny_model(root / "model"), sites=(SITE,))
    harvest = ActivationStore.open(root / "harvest")
    made = TopKSAE(TopKConfig(d_sae=24, k=3), 32)
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    facts = harvest.manifest["model"]
    made.metadata = {
        "harvest": str(harvest.path), "site": SITE,
        "model_spec": facts["spec"], "weights_hash": facts["weights_hash"],
    }  # fmt: skip
    made.eval().save(root / "sae")
    sae.index(sae.IndexConfig(run=str(root / "sae"), out=str(root / "store")))
    return root


def config(folder: Path, **more: object) -> EffectsConfig:
    given = {"store": str(folder / "store"), "positions": POSITIONS, "prompt": PROMPT, **more}
    return EffectsConfig(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def before(folder: Path) -> bytes:
    return (folder / "store" / "features.duckdb").read_bytes()


@pytest.fixture(scope="module")
def store(folder: Path, before: bytes) -> FeatureStore:
    with FeatureStore.open(folder / "store") as plain:
        assert EFFECTS not in plain.meta
        assert plain.measured_effects(0) is None
    return FeatureStore.open(measure_effects(config(folder)))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder / "model"), dtype="float32")


def last_logits(model: Model, tokens: list[int], at: int, change: torch.Tensor) -> torch.Tensor:
    def edit(h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, at] += change
        return h

    with model.edit({SITE: edit}):
        return model.logits(torch.tensor([tokens[: at + 1]]))[0, at].double()


def test_the_measured_effect_is_the_mean_change_where_the_feature_is_active(
    folder: Path, store: FeatureStore, model: Model
) -> None:
    own = sae.load(str(folder / "sae"))
    plan = plan_effects(store, POSITIONS, np.array(store.live_features()), NO_FEATURES, 0)
    live = store.live_features()
    assert sorted(set(plan.direction.tolist())) == live
    for feature in live[:4]:
        mine = plan.direction == feature
        assert len(set(plan.sequence[mine].tolist())) == mine.sum() <= POSITIONS
        active = {int(p) for p in store.activations(feature)[0]}
        step = store.feature(feature).mean * own.W_dec[feature].detach()
        changes, kls = [], []
        for sequence, index in zip(plan.sequence[mine], plan.index[mine], strict=True):
            assert sequence * store.context + index in active
            sql = "SELECT tokens FROM db.sequence WHERE sequence = ?"
            [(tokens,)] = store.database.rows(sql, [int(sequence)])
            old = last_logits(model, tokens, int(index), 0 * step).log_softmax(0)
            new = last_logits(model, tokens, int(index), step).log_softmax(0)
            changes.append(new - old)
            kls.append(float((old.exp() * (old - new)).sum()))
        mean = torch.stack(changes).mean(0)
        error = torch.stack(changes).std(0) / len(changes) ** 0.5
        found = store.measured_effects(feature)
        assert found is not None
        value, token = mean.topk(10)
        np.testing.assert_allclose([e.value for e in found.top], value, rtol=1e-3, atol=1e-5)
        assert [e.token_id for e in found.top][:3] == token.tolist()[:3]
        assert found.bottom[0].value == pytest.approx(float(mean.min()), rel=1e-3)
        first = found.top[0]
        assert first.error == pytest.approx(float(error[first.token_id]), rel=1e-2)
        more = store.feature(feature).more
        assert more["measured_kl"] == pytest.approx(np.mean(kls), rel=1e-3)
        assert more["measured_positions"] == len(changes)


def test_scores_are_those_of_an_amplified_pass(
    folder: Path, store: FeatureStore, model: Model
) -> None:
    own = sae.load(str(folder / "sae"))
    tokens = model.tokenize(PROMPT)
    at = len(tokens) - 1
    x = model.capture(torch.tensor([tokens]), [SITE])[SITE][0, at:]
    largest = float(own.encode_sparse(x).value.detach().max())
    W_U, norm = model.unembedding()
    plain = last_logits(model, tokens, at, torch.zeros(32)).log_softmax(0)
    for feature in store.live_features()[:6]:
        direction = own.W_dec[feature].detach()
        logits = last_logits(model, tokens, at, 10 * largest * direction)
        p = logits.softmax(0)
        tops = direct_logits(direction[None], W_U, norm)[0].topk(20).indices
        rank = min(int((p > p[t]).sum()) for t in tops)
        score = (1 - rank / len(p)) * float(p[tops].max())
        change = [-float(each.log_softmax(0).topk(20).values.mean()) for each in (logits, plain)]
        more = store.feature(feature).more
        assert more["output_score"] == pytest.approx(score, rel=1e-3, abs=1e-7)
        assert more["confidence_change"] == pytest.approx(change[0] - change[1], abs=1e-3)


def test_random_directions_say_what_effects_mean(store: FeatureStore) -> None:
    said = store.meta[EFFECTS]
    live = len(store.live_features())
    assert said["random_directions"] == live
    assert said["null"].keys() == {"measured_kl", "rise", "output_score", "confidence_change"}
    assert all(low <= middle <= high for low, middle, high in said["null"].values())
    assert said["agreement"].keys() == {"measured", "direct", "other_feature"}
    assert said["agreement"]["measured"][1] > said["agreement"]["other_feature"][1]
    assert said["pairs"][0] == said["pairs"][1]


def test_features_are_sorted_and_filtered_by_scores(store: FeatureStore) -> None:
    assert set(MEASURED_COLUMNS) <= set(store.number_columns)
    page = store.features(sort="output_score", descending=True, limit=3).rows
    scores = page["output_score"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    bound = FeatureFilter(between=(Between("confidence_change", low=0.0),))
    found = store.features(bound).rows["confidence_change"].to_pylist()
    assert all(value >= 0 for value in found)


def test_nothing_else_of_the_store_changes(
    folder: Path, store: FeatureStore, before: bytes, tmp_path: Path
) -> None:
    (tmp_path / "old.duckdb").write_bytes(before)
    with duckdb.connect() as con:
        for name, path in (("old", tmp_path / "old.duckdb"), ("new", store.path)):
            con.execute(f"ATTACH '{path}' AS {name} (READ_ONLY)")
        names = [
            n
            for (n,) in con.execute(
                "SELECT table_name FROM duckdb_tables() WHERE database_name = 'old'"
            ).fetchall()
        ]
        for name in names:
            if name in ("measured_logit", "meta"):
                continue
            columns = "*" if name != "feature" else f"* EXCLUDE ({', '.join(MEASURED_COLUMNS)})"
            old = con.execute(f"SELECT * FROM old.{name}").fetchall()
            assert con.execute(f"SELECT {columns} FROM new.{name}").fetchall() == old, name


def test_a_killed_run_goes_on_and_ends_with_the_same(
    folder: Path,
    store: FeatureStore,
    before: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "features.duckdb").write_bytes(before)
    real, calls = measuring._of_sequences, []

    def dies(*given: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "_of_sequences", dies)
    monkeypatch.setattr(measuring, "_SEQUENCES", 2)
    with pytest.raises(KeyboardInterrupt):
        measure_effects(config(tmp_path))
    begun = pending_folder(tmp_path / "store" / "effects")
    assert len(list(begun.glob("effects-*.npz"))) == 2
    first = len(calls)
    with FeatureStore.open(measure_effects(config(tmp_path))) as again:
        assert len(calls) - first == -(-len(plan_of(again)) // 2) - 2
        for feature in again.live_features():
            assert again.measured_effects(feature) == store.measured_effects(feature)
    assert not begun.exists()


def plan_of(store: FeatureStore) -> set[int]:
    with_random = plan_effects(store, POSITIONS, np.array(store.live_features()), NO_FEATURES, 0)
    return set(with_random.sequence.tolist())


def test_time_that_is_up_leaves_features_out(folder: Path, before: bytes, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    path = tmp_path / "store" / "features.duckdb"
    path.write_bytes(before)
    as_store_schema(path, 4)
    with FeatureStore.open(path) as old:
        assert old.measured_effects(1) is None
    measure_effects(config(tmp_path, seconds=0.0))
    with FeatureStore.open(path) as store:
        assert store.meta["schema"] == 5
        assert store.meta[EFFECTS]["pairs"][0] == 0
        assert store.measured_effects(1) is None
        assert store.feature(store.live_features()[0]).more["output_score"] is not None
    written = path.stat().st_mtime_ns
    measure_effects(config(tmp_path))  # it has them
    assert path.stat().st_mtime_ns == written


def test_some_features_can_be_asked_for(folder: Path, before: bytes, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "features.duckdb").write_bytes(before)
    with FeatureStore.open(measure_effects(config(tmp_path, features=5))) as store:
        every = [store.feature(n) for n in range(store.d_sae)]
        asked = [each.feature for each in every if each.more["output_score"] is not None]
        assert len(asked) == 5
        assert asked == [each.feature for each in every if each.more["measured_positions"]]
        assert store.meta[EFFECTS]["random_directions"] == 5


def test_the_command_measures_a_dose_response(
    folder: Path, store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feature = store.live_features()[0]
    out = tmp_path / "dose.csv"
    asked = SteerConfig(
        run=str(folder / "sae"), model=str(folder / "model"), store=str(folder / "store"),
        dose=feature, doses=(1.0, 4.0), texts=3, max_new_tokens=4, out=str(out),
    )  # fmt: skip
    assert steer_text(asked).keys() == {"direct", "measured"}
    rows = list(csv.DictReader(out.read_text().splitlines()))
    largest = store.feature(feature).max
    found = [(row["source"], float(row["strength"])) for row in rows]
    assert found == [(s, f * largest) for s in SOURCES for f in (1.0, 4.0)]
    assert "delta CE" in capsys.readouterr().out
    with pytest.raises(InputError, match="give --store"):
        steer_text(dataclasses.replace(asked, store=None))
    with pytest.raises(InputError, match="goes with no other edit"):
        steer_text(dataclasses.replace(asked, add=("3=1",)))
    with pytest.raises(InputError, match=r"\.csv, \.json"):
        steer_text(dataclasses.replace(asked, out="dose.txt"))
    [dead] = [n for n in range(store.d_sae) if n not in store.live_features()][:1] or [None]
    if dead is not None:
        with pytest.raises(InputError, match="never active"):
            steer_text(dataclasses.replace(asked, dose=dead))


def test_what_cannot_be_measured_is_said(folder: Path) -> None:
    with pytest.raises(InputError, match="needs two tokens"):
        measure_effects(config(folder, prompt="", replace=True))
    with pytest.raises(InputError, match="positions"):
        config(folder, positions=0)


def test_the_benchmark_says_how_long_all_features_take(folder: Path, tmp_path: Path) -> None:
    for budget, holds in ((60.0, "1"), (0.0, "0")):
        copy = tmp_path / f"store-{holds}"
        shutil.copytree(folder / "store", copy)
        out = tmp_path / "rows.csv"
        effects_time.measure(
            effects_time.EffectsTimeConfig(
                store=str(copy), positions=POSITIONS, seconds=budget, results=str(out)
            )
        )
        row = results.read(out, effects_time.COLUMNS)[-1]
        with FeatureStore.open(copy) as store:
            assert row["live"] == str(len(store.live_features()))
            assert (row["reached"] == row["live"]) == (holds == "1")
        assert (row["holds"], row["done"] == row["planned"]) == (holds, holds == "1")
