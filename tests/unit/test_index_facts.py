"""What an index says of features besides their activations, against float64 by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sae
from activations import ActivationStore, load_model
from activations.corpora.topics import document_sources, document_topics
from sae.architectures.crosscoder import Crosscoder, CrosscoderConfig
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.normaliser import Normaliser
from sae.indexing.build import direct_logits, logit_histograms
from store import FeatureStore
from tests.tiny import make_tiny_harvest, make_tiny_model

EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
HEADS = "blocks.1.attn.hook_z"
D_SAE, K = 40, 4
TOPICS = ("rivers", "towns", "<b>maths</b>")


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """A tiny model's harvest, of documents whose records have topics; every tenth has none."""
    folder = tmp_path_factory.mktemp("facts")
    make_tiny_harvest(folder, make_tiny_model(folder / "model"), sites=(EARLY, LATE, HEADS))
    corpus = folder / "text" / "corpus.jsonl"
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    for number, record in enumerate(records):
        if number % 10:
            record["topic"] = TOPICS[number % 3]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ActivationStore.open(folder / "harvest")


def finished(made: Any, harvest: ActivationStore, **metadata: Any) -> Any:
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    facts = harvest.manifest["model"]
    known = {"model_spec": facts["spec"], "weights_hash": facts["weights_hash"]}
    made.metadata = {"harvest": str(harvest.path), **known, **metadata}
    return made.eval()


def fitted(harvest: ActivationStore, site: str) -> Normaliser:
    found = harvest.statistics(site)
    mean = torch.from_numpy(found.mean)
    return Normaliser.fit("centred", mean=mean, mean_square=found.mean_square)


def indexed(made: Any, folder: Path, **options: Any) -> FeatureStore:
    made.save(folder / "sae")
    config = sae.IndexConfig(run=str(folder / "sae"), out=str(folder / "store"), **options)
    return FeatureStore.open(sae.index(config))


@pytest.fixture(scope="module")
def of_layers(harvest: ActivationStore) -> TopKSAE:
    made = TopKSAE(TopKConfig(d_sae=D_SAE, k=K), 32)
    made.site_normalisers = {site: fitted(harvest, site) for site in (EARLY, LATE)}
    return finished(made, harvest, site=EARLY, sites=[EARLY, LATE], site_widths=[32, 32])


@pytest.fixture(scope="module")
def several(
    harvest: ActivationStore, of_layers: TopKSAE, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    return indexed(of_layers, tmp_path_factory.mktemp("several"), site=LATE)


def activations_by_hand(made: TopKSAE, harvest: ActivationStore, site: str) -> torch.Tensor:
    """[training tokens, d_sae] in float64, at the scale of training, in the order of tokens."""
    chunks = [harvest.read_chunk(site, chunk.index) for chunk in harvest.chunks("train")]
    x = torch.cat([rows.double() for rows, _ in chunks])
    x = x[torch.cat([token for _, token in chunks]).argsort()]
    normaliser = made.site_normalisers[site]
    y = (x - normaliser.mean.double()) * normaliser.scale.double()
    pre = (y - made.b_dec.double()) @ made.W_enc_T.double().T + made.b_enc.double()
    kept = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0)
    return pre.clamp_min(0) * kept


@torch.no_grad()
def test_the_profile_of_layers_is_that_of_float64(
    harvest: ActivationStore, of_layers: TopKSAE, several: FeatureStore
) -> None:
    dense = torch.stack([activations_by_hand(of_layers, harvest, s) for s in (EARLY, LATE)])
    amount = dense.sum(1)
    share = amount / amount.sum(0).clamp_min(1e-300)
    np.testing.assert_allclose(several.layer_shares(), share.numpy(), rtol=1e-4, atol=1e-9)
    for number in several.live_features():
        counts = [each.count for each in several.layer_profile(number)]
        if not amount[:, number].any():  # it fires in held-out documents alone
            assert counts == []
            assert several.feature(number).more["layer_mean"] is None
            continue
        assert counts == (dense[:, :, number] > 0).sum(1).tolist()
        row = several.feature(number).more
        mean = float(share[1, number])  # of two layers, 0 and 1
        assert row["layer_mean"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert row["layer_std"] == pytest.approx((mean * (1 - mean)) ** 0.5, rel=1e-3, abs=1e-5)
        assert row["layer_peak"] == int(mean > 0.5)
    use = several.meta["layer_use"]
    assert (use["layers"], use["tokens"]) == (2, harvest.n_rows("train"))


def test_the_layers_are_as_alike_as_their_centred_rows(
    harvest: ActivationStore, several: FeatureStore
) -> None:
    first, second = several.layers()
    assert (first.site, second.site, second.cosine_next) == (EARLY, LATE, None)
    rows = []
    for site in (EARLY, LATE):
        chunks = [harvest.read_chunk(site, c.index)[0] for c in harvest.chunks("train")]
        rows.append(torch.cat(chunks).double() - torch.from_numpy(harvest.statistics(site).mean))
    by_hand = torch.nn.functional.cosine_similarity(*rows, dim=1).mean()
    assert first.cosine_next == pytest.approx(float(by_hand), rel=1e-6)


def test_without_tokens_or_other_layers_there_is_no_profile(
    of_layers: TopKSAE, tmp_path: Path
) -> None:
    with indexed(of_layers, tmp_path, site=EARLY, layer_tokens=0) as store:
        assert store.layers() == []
        assert "layer_mean" not in store.columns


@torch.no_grad()
def test_the_effects_on_all_logits_are_counted(
    harvest: ActivationStore, of_layers: TopKSAE, several: FeatureStore
) -> None:
    W_U, weight = load_model(harvest.manifest["model"]["spec"], dtype="float32").unembedding()
    scaled = of_layers.at(LATE).W_dec.double() * (1.0 if weight is None else weight.double())
    effect = (scaled @ W_U.double()).numpy()
    effect -= effect.mean(1, keepdims=True)
    for number, values in enumerate(effect):
        found = several.logit_histogram(number)
        assert found is not None
        assert found.counts.sum() == len(values)
        np.testing.assert_allclose(found.edges[[0, -1]], [values.min(), values.max()], rtol=1e-4)
        counts, _ = np.histogram(values, bins=40)
        # one at an edge may be in either bin, by float32's rounding
        assert np.abs(np.cumsum(counts - found.counts)).max() <= 1


def test_equal_effects_are_in_one_bin() -> None:
    low, high, counts = logit_histograms(torch.full((1, 7), 0.25))
    assert low.tolist() == high.tolist() == [0.25]
    assert counts[0].nonzero()[0].tolist() == [0]
    assert counts.sum() == 7


def test_topics_are_those_of_the_records(harvest: ActivationStore, several: FeatureStore) -> None:
    titles = harvest.document_table()["title"].to_pylist()
    numbers = [int(title.removeprefix("Document ")) for title in titles]
    topics = [TOPICS[n % 3] for n in numbers if n % 10]
    found = {group.name: group.documents for group in several.document_groups()}
    assert found == {topic: topics.count(topic) for topic in TOPICS}
    assert {group.kind for group in several.document_groups()} == {"topic"}


def test_norms_of_heads_are_those_of_the_decoder(harvest: ActivationStore, tmp_path: Path) -> None:
    width = harvest.d_in(HEADS)
    model = load_model(harvest.manifest["model"]["spec"], dtype="float32")
    heads = model.hf.config.num_attention_heads
    assert heads > 1
    made = finished(TopKSAE(TopKConfig(d_sae=D_SAE, k=K), width), harvest, site=HEADS)
    with indexed(made, tmp_path) as store:
        W_dec = made.W_dec.detach().double().numpy().reshape(D_SAE, heads, -1)
        norms = np.sqrt((W_dec**2).sum(-1))
        for number in range(D_SAE):
            found = store.head_norms(number)
            assert [each.head for each in found] == list(range(heads))
            np.testing.assert_allclose([each.norm for each in found], norms[number], rtol=1e-6)
            share = norms[number] / norms[number].sum()
            np.testing.assert_allclose([each.share for each in found], share, rtol=1e-6)
        assert store.layers() == []


def test_a_crosscoder_has_the_norms_of_its_layers(harvest: ActivationStore, tmp_path: Path) -> None:
    made = Crosscoder(CrosscoderConfig(d_sae=D_SAE), 64)
    sides = [fitted(harvest, site) for site in (EARLY, LATE)]
    made.normaliser = Normaliser.side_by_side(sides)
    finished(made, harvest, site=EARLY, sites=[EARLY, LATE], site_widths=[32, 32])
    norms = made.W_dec.detach().double().reshape(D_SAE, 2, 32).norm(dim=-1)  # at training scales
    with indexed(made, tmp_path) as store:
        assert [each.tokens for each in store.layers()] == [0, 0]
        share = (norms / norms.sum(1, keepdim=True)).T
        np.testing.assert_allclose(store.layer_shares(), share.numpy(), rtol=1e-5)
        assert {each.count for each in store.layer_profile(3)} == {None}
        assert store.meta["layer_use"] == {}


def test_sources_are_files_folders_and_data_sets() -> None:
    corpus = {"source": "mix", "mix": [{"source": "wikipedia"}, {"source": "a/*.jsonl"}]}
    keys = ["Paris", "/d/a/one.jsonl:3", "/d/a/b/two.parquet#0", "hf:name:part#12"]
    keys += ["/d/texts/x.txt", "/d/texts/y.txt#1"]
    expected = ["wikipedia", "a/one.jsonl", "a/b/two.parquet", "hf:name:part", "texts", "texts"]
    assert document_sources(corpus, keys) == expected
    assert document_sources({"source": "none"}, ["key 1"]) == [None]


def test_topics_of_a_streamed_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"text": "t", "topic": topic} for topic in ("a", None, " b ", "c", "d")]
    for split in ("train", "test"):
        file = tmp_path / "set" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        lines = [{**line, "topic": "other"} for line in lines]
    name = f"hf:{tmp_path / 'set'}"
    keys = [f"{name}#{n}" for n in (3, 0, 1, 2, 99)] + ["hf:elsewhere#0"]
    corpus = {"source": name, "hf_split": "train"}
    expected = ["c", "a", None, "b", None, None]
    assert document_topics(corpus, keys) == expected
    mix = {"source": "mix", "mix": [{"source": "wikipedia"}, {**corpus, "hf_split": "test"}]}
    assert document_topics(mix, keys)[:2] == ["other", "other"]
    assert document_topics(corpus, keys, "text")[:2] == ["t", "t"]
    capsys.readouterr()
    assert document_topics(corpus, keys, "subject") == [None] * 6
    assert capsys.readouterr().out == "", "it has no such field, which is no fault"
    gone = {"source": f"hf:{tmp_path / 'gone'}"}
    assert document_topics(gone, [f"hf:{tmp_path / 'gone'}#0"]) == [None]
    assert "cannot be streamed again" in capsys.readouterr().out


def test_topics_of_files_that_changed_or_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    there, other = tmp_path / "there.jsonl", tmp_path / "other.parquet"
    there.write_text('{"topic": "a"}\n{"x": 1}\n{"topic": 3}\n{"topic": " b "}\n')
    parquet.write_table(pa.table({"text": ["x", "y"], "topic": ["p", None]}), other)
    keys = [f"{there}:{n}" for n in (1, 2, 3, 4, 9)] + [f"{other}#0", f"{other}#1"]
    keys.append(f"{tmp_path}/gone.jsonl:1")
    expected = ["a", None, None, "b", None, "p", None, None]
    assert document_topics({"source": "x"}, keys) == expected
    assert "gone.jsonl" in capsys.readouterr().out


def test_logit_effects_of_heads_go_through_the_output_matrix(
    harvest: ActivationStore, tmp_path: Path
) -> None:
    # heads side by side are as wide as the residual stream here, and are not in it
    model = load_model(harvest.manifest["model"]["spec"], dtype="float32")
    made = finished(TopKSAE(TopKConfig(d_sae=D_SAE, k=K), model.d_model), harvest, site=HEADS)
    layer: Any = model.hf.model.layers[int(HEADS.split(".")[1])]
    written = made.W_dec.detach() @ layer.self_attn.o_proj.weight.detach().T
    wanted = direct_logits(written, *model.unembedding())
    with indexed(made, tmp_path) as store:
        for number in range(0, D_SAE, 7):
            first = store.logits(number).top[0]
            best = wanted[number].argmax()
            assert first.token_id == int(best)
            assert first.value == pytest.approx(float(wanted[number, best]), rel=1e-4)
