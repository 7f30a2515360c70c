"""The doctor of runs, SAEs, checkpoints, stores, annotations and lenses, and of folders of them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sae
from saescope.__main__ import main
from tests.artefacts import flip, make_everything
from tests.sealing import change_sealed, unseal

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("everything"))


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def doctor(root: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the command on something below the root: its exit code and what it printed."""

    def run(name: str, *options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["doctor", str(root / name), *options])
        found = capsys.readouterr()
        return code, found.out + found.err

    return run


KINDS = {
    "runs/a": "run",
    "runs/a/sae": "SAE",
    "runs/a/checkpoints/last": "checkpoint",
    "stores/a": "store",
    "stores/a/features.duckdb": "store",
    "stores/a/features.annotations.sqlite": "annotations",
    "lens": "lens",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_each_kind_is_known_and_well(doctor: Doctor, name: str, kind: str) -> None:
    code, text = doctor(name)
    assert code == 0
    assert f"{name}: {kind}, " in text
    assert "all well" in text


FILES = {
    "runs/a": (
        "manifest.json", "metrics.jsonl", "evaluation.json", "sae/config.json",
        "sae/weights.safetensors", "checkpoints/last/state.json",
        "checkpoints/last/tensors.safetensors",
    ),
    "stores/a": ("features.duckdb",),
    "lens": ("manifest.json", "weights.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file"), [(name, file) for name, files in FILES.items() for file in files]
)
def test_every_file_that_is_damaged_cut_or_missing_is_named(
    doctor: Doctor, root: Path, name: str, file: str
) -> None:
    path, before = root / name / file, (root / name / file).read_bytes()
    middle = len(before) // 2
    # in a store: a byte of a block that is used
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 2]) + before[middle + 1 :])
    code, text = doctor(name)
    assert (code, f" {file}: " in text) == (1, True), text
    path.write_bytes(before[: len(before) * 2 // 3])
    code, text = doctor(name)
    assert (code, f" {file}: " in text) == (1, True), text
    path.write_bytes(before)
    assert doctor(name)[0] == 0


@pytest.mark.parametrize(
    "file",
    ["metrics.jsonl", "sae/weights.safetensors", "sae/config.json",
     "checkpoints/last/tensors.safetensors", "checkpoints/last/state.json", "manifest.json"],
)  # fmt: skip
def test_a_file_of_a_run_that_is_missing_is_named(doctor: Doctor, root: Path, file: str) -> None:
    (root / "runs/a" / file).unlink()
    code, text = doctor("runs/a")
    assert (code, f" {file}: " in text) == (1, True), text


def test_lines_that_are_lost_are_missed(doctor: Doctor, root: Path) -> None:
    path = root / "runs/a/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    code, text = doctor("runs/a")
    assert code == 1
    assert "truncated   metrics.jsonl: lines that were there" in text


def test_strange_files_are_named(doctor: Doctor, root: Path) -> None:
    for name in ("runs/a", "runs/a/sae", "runs/a/checkpoints/last", "stores/a", "lens"):
        (root / name / "notes.txt").write_text("mine")
        code, text = doctor(name)
        assert (code, "foreign     notes.txt: does not belong here" in text) == (1, True), text
        (root / name / "notes.txt").unlink()


def test_numbers_that_cannot_be_are_named(doctor: Doctor, root: Path) -> None:
    from safetensors.torch import load_file

    path = root / "runs/a/sae/weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][0, 0] = float("nan")
    save_file(tensors, path)
    change_sealed(path.with_name("config.json"))
    code, text = doctor("runs/a")
    assert code == 1
    assert "damaged     sae/weights.safetensors: " in text
    assert "W_dec has 1 values" in text


def test_what_older_versions_wrote_is_well(doctor: Doctor, root: Path) -> None:
    unseal(root / "runs/a/sae/config.json", 2)
    unseal(root / "runs/a/checkpoints/last/state.json", 1)
    code, text = doctor("runs/a")
    assert code == 0
    assert text.count("of an older version, which recorded no checksums") == 2


def test_an_sae_of_another_library(doctor: Doctor, root: Path) -> None:
    sae.convert(
        sae.ConvertConfig(source=str(root / "runs/a"), to="saelens", out=str(root / "saelens"))
    )
    code, text = doctor("saelens")
    assert code == 0
    assert "records no checksums" in text
    weights = root / "saelens/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert doctor("saelens")[0] == 1


def test_damaged_annotations_are_named(doctor: Doctor, root: Path) -> None:
    path = root / "stores/a/features.annotations.sqlite"
    data = path.read_bytes()
    # the head of a page; a letter of a label, which the index of words tells
    for changed in (
        data[:4096] + bytes(100) + data[4196:],
        data.replace(b"label 7 of many words", b"label 7 of mani words"),
        b"x" + data[1:],
    ):
        path.write_bytes(changed)
        for name in ("stores/a", "stores/a/features.annotations.sqlite"):
            code, text = doctor(name)
            assert code == 1
            assert "damaged     features.annotations.sqlite: " in text


def test_a_folder_of_several(doctor: Doctor, root: Path) -> None:
    code, text = doctor(".")
    assert code == 0, text
    for part in ("runs/a: run", "stores/a: store", "lens: lens"):
        assert f"{part}, " in text
    assert "windows checked: all well" in text
    assert ": 4 checked, 0 with something wrong" in text
    flip(root / "runs/a/sae/weights.safetensors", random.Random(0))
    (root / "harvest/manifest.json").write_text("{")
    code, text = doctor(".")
    assert code == 1
    assert ": 4 checked, 2 with something wrong" in text
    assert doctor("runs")[0] == 1
    assert doctor("stores")[0] == 0


def test_what_is_nothing_of_ours(doctor: Doctor, root: Path) -> None:
    (root / "empty").mkdir()
    (root / "other").mkdir()
    (root / "other" / "x.txt").write_text("x")
    for name in ("empty", "other", "nowhere", "other/x.txt"):
        code, text = doctor(name)
        assert code == 2
        assert "nothing" in text
        assert text.count("\n") == 1


def test_only_a_harvest_is_repaired(doctor: Doctor) -> None:
    for option in ("--repair", "--upgrade", "--set-aside"):
        code, text = doctor("runs/a", option)
        assert code == 2
        assert "only a harvest can be: this is a run, which is made again from one" in text
        assert f"given: '{option}'" in text
    assert doctor("harvest", "--repair", "--set-aside")[0] == 0


def test_a_sweep(doctor: Doctor, root: Path) -> None:
    from saescope.seals import write_sealed

    members = {"a": {}, "b": {}}
    write_sealed(root / "runs/members.json", {"schema": 2, "members": members})
    code, text = doctor("runs")
    assert code == 0
    assert "b is not trained yet" in text
    assert "a: run, " in text
    path = root / "runs/members.json"
    path.write_text(path.read_text().replace('"b"', '"c"'))
    code, text = doctor("runs")
    assert code == 1
    assert "damaged     members.json: its content does not match" in text
    # of an older version
    path.write_text(json.dumps(members))
    assert doctor("runs")[0] == 0
    found = root / "runs/reliability.json"
    write_sealed(found, {"schema": 1, "kind": "reliability", "floors": {"fvu": {"mean": 0.5}}})
    assert doctor("runs")[0] == 0
    found.write_text(found.read_text().replace("0.5", "0.4"))
    code, text = doctor("runs")
    assert code == 1
    assert "damaged     reliability.json: its content does not match" in text
    found.unlink()
    left = root / "runs/reliability.unfinished"
    write_sealed(left, {"schema": 1, "kind": "unfinished evaluation", "parts": {"a": {"n": 5}}})
    code, text = doctor("runs")
    assert code == 0
    assert "--reliability was interrupted, and goes on with saescope eval" in text
    left.write_text(left.read_text().replace("5", "4"))
    code, text = doctor("runs")
    assert code == 1
    assert "damaged     reliability.unfinished: its content does not match" in text


def test_leftovers_are_named_and_removed_only_if_asked(doctor: Doctor, root: Path) -> None:
    beside = root / "runs/.a.abcd1234.partial"
    inside = root / "runs/a/checkpoints/.last.wxyz5678.partial"
    for folder, name in ((beside, "a"), (inside, "last")):
        (folder / name).mkdir(parents=True)
        (folder / name / "tensors.safetensors").write_bytes(bytes(1_500_000))
    code, text = doctor("runs/a")
    assert code == 0
    assert text.count("left over   ") == 2
    assert "1.5 MB" in text
    assert "--remove-leftovers removes" in text
    code, text = doctor("runs", "--remove-leftovers")
    assert code == 0
    assert text.count("removed     ") == 2
    assert not beside.exists()
    assert not inside.exists()
    assert "left over" not in doctor("runs")[1]


def test_a_run_that_is_not_finished(doctor: Doctor, root: Path) -> None:
    shutil.rmtree(root / "runs/a/sae")
    code, text = doctor("runs/a")
    assert code == 0
    assert "note        is not finished" in text
    torch.manual_seed(0)
