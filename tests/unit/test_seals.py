"""Seals: damage to any file that is read is found and named; older artefacts have none."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import load
from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.normaliser import Normaliser
from sae.training import checkpoint
from sae.training.telemetry import MetricsLog, read_metrics
from saescope.artefact import DamagedError, sha256_json
from saescope.errors import ArtefactError
from saescope.seals import check_file, crc32c_text, seal_of, seals_of, write_sealed
from tests.sealing import change_sealed, unseal

WEIGHTS = "weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = TopKSAE(TopKConfig(d_sae=24, k=3), 8).eval()
    made.metadata = {"site": "blocks.0.hook_resid_post", "note": "naïve"}
    made.save(tmp_path / "sae")
    return tmp_path / "sae"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_crc32c_of_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"123456789")
    assert seal_of(path) == {"bytes": 9, "crc32c": "e3069283"}  # RFC 3720
    # longer than what is read at once
    path.write_bytes(b"123456789" * 100_000)
    whole = crc32c_text(b"123456789" * 100_000)
    assert seal_of(path) == {"bytes": 900_000, "crc32c": whole}
    assert crc32c_text(b"456789", crc32c_text(b"123")) == "e3069283"


def test_a_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"123456789")
    sealed = seal_of(path)
    check_file(path, sealed)
    for data, kind in ((b"12345678", "truncated"), (b"1234567890", "damaged")):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="x: damaged file: it has") as found:
            check_file(path, sealed)
        assert found.value.kind == kind
    path.write_bytes(b"123456798")
    with pytest.raises(DamagedError, match="does not match its checksum"):
        check_file(path, sealed)
    with pytest.raises(DamagedError, match="its checksum is missing"):
        check_file(path, None)
    path.unlink()
    with pytest.raises(DamagedError, match="damaged file: the file is missing"):
        check_file(path, sealed)


def test_every_bit_of_an_sae_counts(folder: Path) -> None:
    whole = load(folder).state_dict()
    for name in (WEIGHTS, "config.json"):
        path, before = folder / name, (folder / name).read_bytes()
        said = json.loads(before) if name == "config.json" else None
        for bit in range(0, 8 * len(before), 23):
            flip(path, bit)
            if said is not None and _same(path.read_bytes(), said):
                continue  # 1e-05 as 1E-05
            with pytest.raises(ArtefactError, match=r"weights\.safetensors|config\.json"):
                load(folder)
            path.write_bytes(before)
    again = load(folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def _same(data: bytes, said: object) -> bool:
    try:
        return json.loads(data) == said
    except ValueError:
        return False


def test_the_weights_of_another_sae_are_not_taken(folder: Path, tmp_path: Path) -> None:
    TopKSAE(TopKConfig(d_sae=24, k=3), 8).save(tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(DamagedError, match=r"weights\.safetensors: damaged weights"):
        load(folder)


def test_a_seal_that_is_missing_is_damage_but_in_older_schemas(folder: Path) -> None:
    config, before = folder / "config.json", (folder / "config.json").read_text()
    described = json.loads(before)
    del described["sha256"]
    config.write_text(json.dumps(described))
    with pytest.raises(DamagedError, match="does not match its own sha256"):
        load(folder)
    del described["files"]
    write_sealed(config, described)
    with pytest.raises(DamagedError, match="damaged weights: its checksum is missing"):
        load(folder)
    config.write_text(before)
    unseal(config, schema=2)
    assert load(folder).metadata["note"] == "naïve"


@pytest.mark.parametrize("schema", [2, 3])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("W_dec", float("nan"), "W_dec has 1 values of 192 that are NaN"),
        ("b_enc", float("-inf"), "b_enc has 1 values of 24 that are infinite"),
        ("b_dec", float("inf"), "b_dec has 1 values of 8 that are infinite"),
        ("normaliser.scale", 0.0, "the normaliser has an impossible scale"),
        ("normaliser.scale", -1.0, "the normaliser has an impossible scale"),
        ("normaliser.mean", float("nan"), "the normaliser has a mean that is not finite"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    folder: Path, schema: int, name: str, value: float, said: str
) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS)
    change_sealed(folder / "config.json")
    if schema == 2:
        unseal(folder / "config.json", schema)
    with pytest.raises(ArtefactError, match=said) as found:
        load(folder)
    assert str(folder) in str(found.value)


@pytest.mark.parametrize("variance", ["0", "-1.0", "1e999", '"1"', "true", "null"])
def test_a_variance_that_cannot_be_is_refused(folder: Path, variance: str) -> None:
    path = folder / "config.json"
    unseal(path, schema=2)
    described = json.loads(path.read_text())
    described["normalisers"][""]["variance"] = "here"
    path.write_text(json.dumps(described).replace('"here"', variance))
    with pytest.raises(ArtefactError, match="the normaliser has an impossible variance"):
        load(folder)


def test_normalisers_of_sites_are_looked_at(tmp_path: Path) -> None:
    sae = TopKSAE(TopKConfig(d_sae=24, k=3), 8)
    good = Normaliser.identity(8)
    bad = Normaliser("unit_mean_square", torch.zeros(8), torch.tensor(0.0), 1.0)
    sae.site_normalisers = {"here": good, "there": bad}
    sae.save(tmp_path / "sae")
    with pytest.raises(ArtefactError, match="the normaliser of there has an impossible scale"):
        load(tmp_path / "sae")


def test_a_threshold_of_nothing_is_one(tmp_path: Path) -> None:
    """A JumpReLU feature whose threshold is 0 has a logarithm of minus infinity."""
    sae = JumpReLUSAE(JumpReLUConfig(d_sae=24, parametrisation="log"), 8)
    with torch.no_grad():
        sae.log_threshold[0] = -torch.inf
    sae.save(tmp_path / "sae")
    assert load(tmp_path / "sae").state_dict()["log_threshold"][0] == -torch.inf
    with torch.no_grad():
        sae.log_threshold[0] = torch.nan
    sae.save(tmp_path / "sae", replace=True)
    with pytest.raises(ArtefactError, match="log_threshold has 1 values of 24 that are NaN"):
        load(tmp_path / "sae")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_nothing_loses_precision_unsaid(folder: Path, dtype: torch.dtype) -> None:
    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    save_file({**tensors, "W_dec": tensors["W_dec"].to(dtype)}, folder / WEIGHTS)
    change_sealed(folder / "config.json")
    with pytest.raises(ArtefactError, match=r"W_dec is of another type .*allowed: torch\.float32"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("d_in", 2**40), ("d_in", "8"), ("d_in", None), ("d_out", -1)]
)
def test_sizes_are_those_of_the_weights(folder: Path, name: str, value: object) -> None:
    change_sealed(folder / "config.json", lambda found: found.update({name: value}))
    with pytest.raises(ArtefactError, match=f"{name} is not that of the weights"):
        load(folder)
    change_sealed(folder / "config.json", lambda found: found["config"].update(d_sae=2**40))
    with pytest.raises(ArtefactError, match="is not that of the weights"):
        load(folder)


def test_seals_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert list(seals_of(tmp_path, ["b", "a"])) == ["b", "a"]
    write_sealed(tmp_path / "c", {"x": 1})
    assert json.loads((tmp_path / "c").read_text()) == {"x": 1, "sha256": sha256_json({"x": 1})}


# ---- runs ---------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def logged(path: Path, steps: int = 5) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.append(step, fvu=1 / step, kernels="torch")
    return log


def test_every_bit_of_metrics_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logged(path)
    whole, found = path.read_bytes(), read_metrics(path)
    assert [line["fvu"] for line in found] == [1 / step for step in range(1, 6)]
    for bit in range(0, 8 * len(whole), 5):
        flip(path, bit)
        with pytest.raises(DamagedError, match=rf"metrics\.jsonl: line {found_in(whole, bit)}"):
            read_metrics(path)
        path.write_bytes(whole)


def found_in(data: bytes, bit: int) -> str:
    """The number of a bit's line; an end of a line that is lost makes the next one damaged too."""
    return str(data[: bit // 8].count(b"\n") + 1)


@pytest.mark.parametrize("order", [[0, 2, 3, 4], [1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 0, 1, 2]])
def test_lines_that_are_lost_or_moved_are_found(tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    logged(path)
    lines = lines_of(path)
    path.write_text("".join(lines[n] + "\n" for n in order))
    with pytest.raises(DamagedError, match="is damaged, or lines ahead of it"):
        read_metrics(path)


def test_metrics_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    logged(one)
    log = logged(other, 3)
    sealed = log.seal()
    log.append(4, fvu=9.0)
    log = MetricsLog(other, resume_step=3, sealed=sealed)
    for step in (4, 5):
        log.append(step, fvu=1 / step, kernels="torch")
    assert one.read_bytes() == other.read_bytes()
    assert log.seal() == seal_of(one)


def test_metrics_that_a_checkpoint_knew_are_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    sealed = logged(path).seal()
    path.write_text("".join(line + "\n" for line in lines_of(path)[:-1]))
    with pytest.raises(DamagedError, match="lines that were there when the checkpoint was taken"):
        MetricsLog(path, resume_step=5, sealed=sealed)
    path.unlink()
    MetricsLog(path, resume_step=5, sealed=sealed).append(6, fvu=0.5)
    assert "measurements up to step 5 are lost" in capsys.readouterr().out
    assert read_metrics(path) == [{"step": 6, "fvu": 0.5}]


def test_metrics_of_older_versions(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fvu": 0.25}\n')
    assert read_metrics(path) == [{"step": 1, "fvu": 0.5}, {"step": 2, "fvu": 0.25}]
    MetricsLog(path, resume_step=2).append(3, fvu=0.1)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert all("crc32c" in line for line in lines_of(path))
    path.write_text('{"step": 1, "fvu": 0.5}\n{"step": 2, "fvu": 0.25\n')
    with pytest.raises(DamagedError, match="line 2 is damaged"):
        read_metrics(path)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    tensors = {"sae": {"W": torch.randn(4, 3)}, "run": {"rng": torch.arange(5, dtype=torch.uint8)}}
    checkpoint.save(tmp_path / "last", tensors=tensors, state={"step": 3, "tag": "x"})
    return tmp_path / "last"


def test_every_bit_of_a_checkpoint_counts(kept: Path) -> None:
    tensors, state = checkpoint.load(kept)
    assert (state["step"], list(tensors)) == (3, ["sae", "run"])
    for path in sorted(kept.iterdir()):
        before = path.read_bytes()
        for bit in range(0, 8 * len(before), 5):
            flip(path, bit)
            with pytest.raises(ArtefactError, match=re.escape(path.name)):
                checkpoint.load(kept)
            path.write_bytes(before)
    (kept / "tensors.safetensors").unlink()
    with pytest.raises(DamagedError, match="damaged checkpoint: the file is missing"):
        checkpoint.load(kept)


def test_a_checkpoint_of_an_older_version_is_read(kept: Path) -> None:
    unseal(kept / "state.json", schema=1)
    assert checkpoint.load(kept)[1]["step"] == 3
    unsealed = json.loads((kept / "state.json").read_text())
    (kept / "state.json").write_text(json.dumps({**unsealed, "schema": 2}))
    with pytest.raises(DamagedError, match="does not match its own sha256"):
        checkpoint.load(kept)
    for schema in (3, True, None, 0):
        (kept / "state.json").write_text(json.dumps({**unsealed, "schema": schema}))
        with pytest.raises(ArtefactError, match="checkpoint of another version"):
            checkpoint.load(kept)
