"""int8 storage: right numbers, half the disk, and every reader, check and repair works on it."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import sae
from activations import ActivationLoader, ActivationStore, HarvestConfig, harvest, load_model
from activations.harvesting import pipeline
from activations.loading.unshuffled import aligned_rows
from activations.storage.layout import row_arrays
from activations.storage.row_formats import SCALE, SiteRows, floats, site_arrays, stored
from activations.storage.verify import examine
from activations.storage.writer import HarvestWriter
from sae.data.harvests import read_chunk
from saescope.__main__ import main
from saescope.config import from_dict
from saescope.errors import InputError
from saescope.paths import local
from tests.damage import DAMAGES, GROUP, assert_same_content
from tests.interrupt import Interrupt, Killed
from tests.tiny import make_tiny_harvest, make_tiny_model

SITES = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_k")
SITE = SITES[0]


def test_int8_by_hand() -> None:
    x = torch.tensor([[127.0, -63.4, 0.49, 0.51], [0, 0, 0, 0], [2.54, -1.0, 0.0, 0.02]])
    q, scale = stored(x, "int8")
    assert q.dtype == torch.int8
    assert q.tolist() == [[127, -63, 0, 1], [0, 0, 0, 0], [127, -50, 0, 1]]
    assert scale.tolist() == pytest.approx([1.0, 0.0, 0.02])
    assert floats([q, scale])[0].tolist() == [127, -63, 0, 1]
    assert floats([q, scale])[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-3, 1.0, 1e30])
def test_no_value_is_off_by_more_than_half_a_scale(size: float) -> None:
    x = size * torch.randn(200, 33, generator=torch.Generator().manual_seed(0))
    q, scale = stored(x, "int8")
    assert int(q.min()) >= -127
    error = (floats([q, scale]).double() - x.double()).abs()
    assert bool((error <= 0.50001 * scale[:, None].double() + 1e-36).all())
    # the largest value of a row keeps its place at the end of the scale
    assert size < 1e-40 or q.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(InputError, match="not finite"):
        SiteRows(SITE, 3, 4, "int8").append(x)


def test_sums_are_of_what_is_read_back() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    rows = SiteRows(SITE, 50, 7, "int8")
    for part in x.split(20):
        rows.append(part)
    back = floats([torch.from_numpy(each) for each in rows.arrays.values()]).double()
    assert not torch.equal(back, x.double())
    assert rows.sums().count == 50
    assert torch.allclose(torch.from_numpy(rows.sums().total), back.sum(0), rtol=1e-12)
    assert rows.sums().square == pytest.approx(float(back.square().sum()), rel=1e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    make_tiny_model(folder / "model")
    return folder


def make(root: Path, folder: Path, storage: str) -> Path:
    return make_tiny_harvest(
        folder, root / "model", sites=SITES, documents=30, window_chunks=4, storage=storage
    )


@pytest.fixture(scope="module")
def small(root: Path) -> ActivationStore:
    return ActivationStore.open(make(root, root / "small", "int8"))


@pytest.fixture(scope="module")
def plain(root: Path) -> ActivationStore:
    return ActivationStore.open(make(root, root / "plain", "bfloat16"))


def test_rows_are_the_models_own_rounded(small: ActivationStore, root: Path) -> None:
    model = load_model(str(root / "model"), dtype="float32")
    for window in small.windows:
        for chunk in window.chunks(128)[:1]:
            x, row_token = small.read_chunk(SITE, chunk.index)
            assert x.dtype == torch.float32
            sequence, position = np.divmod(row_token.numpy(), small.context)
            captured = model.capture(torch.from_numpy(small.tokens[sequence]), [SITE])[SITE]
            exact = captured[torch.arange(len(x)), position].double()
            scale = exact.abs().amax(1, keepdim=True) / 127
            assert bool(((x - exact).abs() <= 0.501 * scale).all())
            assert float((x - exact).norm()) > 0


def test_float32_has_the_models_own_rows(root: Path, plain: ActivationStore) -> None:
    exact = ActivationStore.open(make(root, root / "exact", "float32"))
    assert exact.windows == plain.windows
    for chunk in exact.chunks("train"):
        x, rows = exact.read_chunk(SITE, chunk.index)
        other, same = plain.read_chunk(SITE, chunk.index)
        assert x.dtype == torch.float32
        assert torch.equal(rows, same)
        assert torch.equal(x.bfloat16(), other)
        assert not torch.equal(x, other.float())
    every = [exact.read_chunk(SITE, chunk.index)[0].double() for chunk in exact.chunks("train")]
    found = exact.statistics(SITE)
    np.testing.assert_allclose(found.mean, torch.cat(every).mean(0).numpy(), rtol=1e-9, atol=1e-12)


def test_the_same_rows_as_in_bfloat16_on_half_the_disk(
    small: ActivationStore, plain: ActivationStore
) -> None:
    assert small.storage == "int8"
    assert small.windows == plain.windows
    assert small.hash != plain.hash
    for split in ("train", "held_out"):
        for chunk in small.chunks(split):
            x, rows = small.read_chunk(SITE, chunk.index)
            other, same = plain.read_chunk(SITE, chunk.index)
            assert torch.equal(rows, same)
            assert float((x - other.float()).norm() / other.float().norm()) < 0.02
    one, two = small.statistics(SITE), plain.statistics(SITE)
    assert one.count == two.count
    assert one.mean_square == pytest.approx(two.mean_square, rel=0.01)

    def size(store: ActivationStore) -> int:
        folders = store.path.glob(f"{GROUP}/{SITE}*")
        return sum(p.stat().st_size for f in folders for p in f.rglob("0") if p.is_file())

    assert size(small) < 0.57 * size(plain)  # of a width of 32; nearer to half for wider sites


def test_statistics_are_of_the_stored_rows(small: ActivationStore) -> None:
    rows = torch.cat([small.read_chunk(SITE, c.index)[0] for c in small.chunks("train")]).double()
    found = small.statistics(SITE)
    assert found.count == len(rows)
    assert np.allclose(found.mean, rows.mean(0).numpy(), rtol=1e-9)
    assert found.mean_square == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-6)


def test_every_reader_gives_the_same_rows(small: ActivationStore) -> None:
    read = [small.read_chunk(SITE, chunk.index) for chunk in small.chunks("train")]
    of_token = {int(r): x for xs, rows in read for x, r in zip(xs, rows, strict=True)}
    pieces = list(aligned_rows(small, SITES, split="train", piece=50))
    assert torch.equal(torch.cat([x for (x, _), _ in pieces]), torch.cat([x for x, _ in read]))
    for order in ("chunks", "spread", "windows"):
        loader = ActivationLoader(small, SITES, batch_size=100, epochs=1, order=order)
        for (x, k), row_token in loader.with_rows():
            assert (x.dtype, k.shape[1]) == (torch.float32, 16)
            expected = torch.stack([of_token[int(row)] for row in row_token])
            assert torch.equal(x, expected)
    both, rows = read_chunk(small, SITES, small.chunks("train")[0])
    assert both.shape == (len(rows), 48)
    assert torch.equal(both[:, :32], read[0][0])


def test_other_readers_of_zarr_find_numbers_and_scales(small: ActivationStore) -> None:
    group: Any = zarr.open_group(small.path / GROUP, mode="r")
    values, scales = group[SITE], group[SITE + SCALE]
    assert (values.dtype, values.fill_value) == (np.int8, -128)
    assert values.attrs["scaled_by"] == SITE + SCALE
    chunk = small.chunks("train")[1]
    part = slice(chunk.index * 128, chunk.index * 128 + chunk.rows)
    expected = values[part].astype(np.float32) * scales[part][:, None]
    assert np.array_equal(expected, small.read_chunk(SITE, chunk.index)[0].numpy())


def test_every_damage_is_named_and_repaired(small: ActivationStore, tmp_path: Path) -> None:
    assert examine(small).faults == []
    copy = Path(shutil.copytree(local(small.path), tmp_path / "copy"))
    chance, named = random.Random(3), set()
    for damage in DAMAGES:
        named |= set(damage(copy, chance).paths)
    scale, other = copy / GROUP / (SITE + SCALE) / "c" / "1", copy / GROUP / (SITE + SCALE) / "c"
    scale.write_bytes((other / "2").read_bytes())
    (copy / GROUP / SITE / "c" / "3" / "0").unlink()
    named |= {f"{GROUP}/{SITE}{SCALE}/c/1", f"{GROUP}/{SITE}/c/3/0"}
    if "windows.jsonl" not in named:
        found = {fault.path for fault in examine(ActivationStore.open(copy)).faults}
        assert found == named
    assert main(["doctor", str(copy), "--repair"]) == 0
    assert_same_content(copy, small.path)


def test_the_ledger_is_rebuilt(small: ActivationStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(local(small.path), tmp_path / "copy"))
    (copy / "windows.jsonl").unlink()
    assert main(["doctor", str(copy), "--repair"]) == 0
    assert_same_content(copy, small.path)


def test_a_killed_harvest_goes_on_to_the_same_bytes(
    small: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**small.manifest["config"], "out": str(tmp_path / "out")}
    config = from_dict(HarvestConfig, values, "test")
    with monkeypatch.context() as patch:
        Interrupt(patch, HarvestWriter, "write", 3, Killed())
        with pytest.raises(Killed):
            harvest(config)
    assert_same_content(harvest(config).path, small.path)


def test_trains_and_is_indexed(small: ActivationStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tmp_path / "train.toml"
    config.write_text(
        f'harvest = "{small.path}"\nout = "{run}"\nsite = "{SITE}"\npasses = 3.0\n'
        'order = "spread"\n[sae]\nd_sae = 64\nk = 8\n[trainer]\nbatch_size = 64\nlr = 0.003\n'
    )
    assert main(["train", str(config)]) == 0
    assert sae.load(run).metadata["held_out"]["fvu"] < 1
    assert main(["index", str(run), "--out", str(tmp_path / "index")]) == 0


def test_a_harvest_older_than_the_setting_goes_on_as_bfloat16(
    plain: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(local(plain.path), tmp_path / "copy"))
    writer = HarvestWriter(ActivationStore.open(copy))
    for name in ("storage", "statistics_windows"):
        del writer._facts["config"][name]
    writer._write_manifest()
    older = ActivationStore.open(copy)
    assert "storage" not in older.manifest["config"]
    assert older.storage == "bfloat16"
    assert row_arrays(older.manifest).keys() == {"row_token", *SITES}
    values = {**plain.manifest["config"], "out": str(copy)}
    monkeypatch.setattr(pipeline, "_go_on", None)
    assert harvest(from_dict(HarvestConfig, values, "test")).n_rows() == plain.n_rows()
    with pytest.raises(InputError, match="storage is 'bfloat16' there and 'int8' here"):
        harvest(from_dict(HarvestConfig, values | {"storage": "int8"}, "test"))


def test_storage_has_three_kinds() -> None:
    with pytest.raises(InputError, match="storage"):
        from_dict(HarvestConfig, {"storage": "int4"}, "test")
    assert site_arrays("a", 3, "none") == {}
    assert [each.nbytes for each in site_arrays("a", 3, "int8").values()] == [3, 4]
    assert [each.nbytes for each in site_arrays("a", 3, "bfloat16").values()] == [6]
