"""Families of features by measure: classes of sources by hand, sums by another way, the table."""

from typing import Any

import numpy as np
import pytest
import torch

from activations import Model, load_model
from sae.analysis.attention import (
    Distances,
    attribute,
    feature_sources,
    head_attribution,
    head_table,
)
from sae.analysis.attention.families import GROUPS, MIXED, FeatureSources, families_of
from sae.analysis.attention.head_table import effective
from sae.analysis.attention.heads import HeadAttribution
from sae.analysis.attention.source_classes import CLASSES, source_classes
from sae.architectures.relu import ReLUConfig, ReLUSAE
from saescope.errors import InputError
from tests.tiny import D_MODEL, SENTENCES, make_tiny_model

Z, OUT = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
SEVERAL = Distances(near=1, far=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


def relu() -> ReLUSAE:
    torch.manual_seed(0)
    made = ReLUSAE(ReLUConfig(d_sae=12), D_MODEL).eval()
    with torch.no_grad():
        made.b_enc.normal_(std=0.1)
    return made


def texts(model: Model) -> list[list[int]]:
    found = [model.tokenize(each)[:14] for each in SENTENCES]
    return [*found, *found, *found][:GROUPS]


def test_classes_of_sources_by_hand() -> None:
    first, induction, local, middle, far = range(5)
    tokens = torch.tensor([0, 5, 6, 7, 5, 5, 8, 6])
    keep = torch.tensor([False] + [True] * 7)
    found = source_classes(tokens, keep, SEVERAL)
    assert found[7].tolist() == [first, far, far, induction, middle, middle, local, local]
    assert found[4].tolist()[:5] == [first, middle, induction, local, local]
    # its own predecessor's token is its own: that is no repeat that leads to itself
    assert found[5].tolist()[:6] == [first, far, induction, middle, local, local]
    assert found[2, 3:].tolist() == [-1] * 5
    assert (source_classes(tokens, torch.ones(8, dtype=torch.bool), SEVERAL)[7, 0]) == far


def test_families_of_shares() -> None:
    rows = [
        [0.9, 0.06, 0.0, 0.04, 0.0],
        [0.0, 0.5, 0.5, 0, 0],
        [0, 0.1, 0.2, 0.1, 0.6],
        [np.nan] * 5,
    ]
    assert families_of(np.array(rows)).tolist() == [0, MIXED, 3, -1]


@pytest.mark.parametrize("site", [Z, OUT])
def test_sums_are_those_of_attribute(model: Model, site: str) -> None:
    made, given = relu(), texts(model)
    found = feature_sources(
        model, made, given, site=site, distances=SEVERAL, allow_other_model=True
    )
    feature = int(found.firings.argmax())
    shares, heads, weights, fired = np.zeros(len(CLASSES)), np.zeros(4), 0.0, 0
    best: tuple[float, int] = (0.0, -1)
    for ids in given:
        tokens = torch.tensor(ids)
        keep = model.keep_mask(tokens[None])[0]
        kinds = source_classes(tokens, keep, SEVERAL)
        x = model.capture(tokens[None], [site])[site][0].float()
        value = made.encode(x)[:, feature].detach()
        for at in (keep & (value > 0)).nonzero()[:, 0].tolist():
            sources = attribute(
                model, made, ids, feature, at, site=site, allow_other_model=True
            ).sources.clip(0)
            weight, total = float(value[at]), sources.sum()
            for n in range(len(CLASSES)):
                mine = (kinds[at, : at + 1] == n).numpy()
                shares[n] += weight * sources[:, mine].sum() / total
            heads += weight * sources.sum(1) / total
            weights, fired = weights + weight, fired + 1
            best = max(best, (weight, ids[int(sources.sum(0).argmax())]))
    assert fired > 20
    assert found.firings[feature] == fired
    assert found.shares()[feature] == pytest.approx(shares / weights, rel=1e-4, abs=1e-6)
    assert found.by_head[feature] == pytest.approx(heads / weights, rel=1e-4, abs=1e-6)
    assert found.strongest[feature] == pytest.approx(best[0], rel=1e-4)
    assert found.token[feature] == best[1]
    assert np.nansum(found.shares(random=True)[feature]) == pytest.approx(1, rel=1e-4)
    assert found.shares(random=True)[feature] != pytest.approx(found.shares()[feature], rel=1e-2)
    every = found.shares(np.arange(GROUPS))
    np.testing.assert_allclose(every, found.shares())
    some = found.shares(np.zeros(GROUPS, dtype=np.int64))
    assert not np.allclose(np.nan_to_num(some), np.nan_to_num(every))


def made_sources(families: list[int], random: list[int]) -> FeatureSources:
    """Features that go by one class in all groups of texts."""
    count, classes = len(families), len(CLASSES)
    sums = np.zeros((2, GROUPS, count, classes))
    for which, given in enumerate((families, random)):
        for feature, family in enumerate(given):
            sums[which, :, feature, family + 1] = 1.0
    return FeatureSources(
        layer=1,
        firings=np.array([100] * (count - 1) + [2]),
        weight=np.ones((GROUPS, count)),
        by_class=sums[0],
        random_by_class=sums[1],
        by_head=np.zeros((count, 2)),
        strongest=np.ones(count),
        token=np.zeros(count, dtype=np.int64),
        texts=GROUPS,
    )


def of_heads(heads: list[int]) -> HeadAttribution:
    norm = torch.full((len(heads), 2), 0.25, dtype=torch.float64)
    for feature, head in enumerate(heads):
        norm[feature, head] = 1.0 + feature
    return HeadAttribution(
        layer=1, side="decoder", norm=norm, outside=torch.zeros(len(heads)), unique=True,
        random=torch.ones(4, 2, dtype=torch.float64),
    )  # fmt: skip


def test_the_table_by_hand() -> None:
    # head 0: five features of induction and one that is local; head 1: three of one family each;
    # the last feature fires too seldom
    heads = [0] * 6 + [1] * 3 + [0]
    sources = made_sources([0] * 5 + [1] + [0, 1, 3] + [2], [1] * 10)
    one, two = head_table(sources, of_heads(heads), draws=50)
    assert (one.layer, one.head, one.features, two.features) == (1, 0, 6, 3)
    assert one.shares == pytest.approx(
        {"induction": 5 / 6, "local": 1 / 6, "middle": 0, "long-range": 0, "mixed": 0}
    )
    assert two.shares["long-range"] == pytest.approx(1 / 3)
    assert one.random["local"] == two.random["local"] == 1
    assert one.top[:2] == [5, 4]  # the largest shares, of those that fire often
    assert 9 not in one.top
    assert two.effective == pytest.approx(3)
    assert one.effective == pytest.approx(np.exp(-(5 / 6 * np.log(5 / 6) + np.log(1 / 6) / 6)))
    assert one.effective_interval == pytest.approx((one.effective, one.effective))
    assert one.others is not None
    assert one.effective is not None
    assert one.others[1] > one.effective  # six of all heads may be more various
    assert effective(np.zeros(5)) == 1.0


def test_intervals_are_over_texts() -> None:
    sources = made_sources([0, 0], [1, 1])
    sources.firings[:] = 100
    # feature 0 goes by repeats in half of the groups of texts, and by what is near in the others
    sources.by_class[8:, 0] = 0
    sources.by_class[8:, 0, 2] = 1.0
    (row, _) = head_table(sources, of_heads([0, 0]), draws=200)
    assert row.intervals["induction"] == (0.5, 1.0)
    assert row.shares["mixed"] == 0.5  # exactly half is no majority


def test_the_table_of_a_model(model: Model) -> None:
    made, given = relu(), texts(model)
    found = feature_sources(model, made, given, site=Z, allow_other_model=True)
    heads = head_attribution(model, made, site=Z, allow_other_model=True)
    rows = head_table(found, heads, draws=20)
    assert [row.head for row in rows] == [0, 1, 2, 3]
    assert sum(row.features for row in rows) == (found.firings >= 10).sum() > 0
    for row in rows:
        if row.features:
            assert sum(row.shares.values()) == pytest.approx(1)
            for name, (low, high) in row.intervals.items():
                assert 0 <= low <= high <= 1, name


def test_texts_of_nothing_that_saes_read_count_nothing(model: Model) -> None:
    made, given = relu(), texts(model)
    plain, more = (
        feature_sources(model, made, each, site=Z, allow_other_model=True)
        for each in (given, [*given[:-1], [3]])
    )
    assert more.firings.sum() < plain.firings.sum()
    assert more.texts == GROUPS


def test_what_is_refused(model: Model) -> None:
    made: Any = relu()
    with pytest.raises(InputError, match="texts"):
        feature_sources(model, made, texts(model)[:3], site=Z, allow_other_model=True)
    with pytest.raises(InputError, match="belong to attention heads"):
        feature_sources(
            model, made, texts(model), site="blocks.1.hook_resid_post", allow_other_model=True
        )
    with pytest.raises(InputError, match="far"):
        Distances(near=4, far=4)
    with pytest.raises(InputError, match="two SAEs"):
        head_table(made_sources([0], [0]), of_heads([0, 1]))
