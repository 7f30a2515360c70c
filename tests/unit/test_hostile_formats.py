"""SAE files made to do harm, or carelessly: one clear line each, and nothing is executed."""

import io
import itertools
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from sae.formats.load import load
from saescope.errors import ArtefactError, InputError, SaescopeError
from tests.marker import Marker

D_IN, D_SAE = 4, 8
ODD: tuple[Any, ...] = (
    [], {}, "x", -1, 1.5, float("nan"), float("inf"), True, 10**400, 0, 2**33, "\0", [[]] * 3,
    "model.layers.1." + "x" * 100_000,
)  # fmt: skip


def gemma() -> dict[str, Tensor]:
    return {
        "W_enc": torch.ones(D_IN, D_SAE),
        "W_dec": torch.ones(D_SAE, D_IN),
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
        "threshold": torch.ones(D_SAE),
    }


def topk() -> dict[str, Tensor]:
    return {
        "encoder.weight": torch.ones(D_SAE, D_IN),
        "encoder.bias": torch.zeros(D_SAE),
        "decoder.weight": torch.ones(D_IN, D_SAE),
        "b_dec": torch.zeros(D_IN),
    }


TOPK = {"trainer": {"dict_class": "AutoEncoderTopK", "k": 2}}


def one_line(folder: Path) -> str | None:
    """Load: what is said if it is refused, None if not; anything but our errors fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sae = load(folder)
        except SaescopeError as error:
            said = str(error)
            assert len(said) < 2500, said[:200]
            assert "\n" not in said
            return said
    with torch.no_grad():
        assert torch.isfinite(sae(torch.randn(3, sae.d_in)).x_hat).all()
    return None


def test_configurations_of_any_type_are_answered(tmp_path: Path) -> None:
    """Every key of every family, with every odd value."""
    plain = {n: v for n, v in gemma().items() if n != "threshold"}
    saelens = {
        "architecture": "topk",
        "k": 2,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "metadata": {"sae_lens_version": "6.54.12"},
    }
    sparsify = {
        "encoder.weight": torch.ones(D_SAE, D_IN),
        "encoder.bias": torch.zeros(D_SAE),
        "W_dec": torch.ones(D_SAE, D_IN),
        "b_dec": torch.zeros(D_IN),
    }
    families: list[tuple[str, str, dict, str, tuple[str, ...]]] = [
        (
            "sae_weights.safetensors",
            "cfg.json",
            saelens,
            "saelens",
            (
                "architecture",
                "d_in",
                "d_sae",
                "k",
                "apply_b_dec_to_input",
                "normalize_activations",
                "metadata",
                "finetuning_scaling_factor",
                "rescale_acts_by_decoder_norm",
            ),
        ),
        (
            "params.safetensors",
            "config.json",
            {"architecture": "jump_relu"},
            "gemma",
            (
                "hf_hook_point_in",
                "hf_hook_point_out",
                "model_name",
                "architecture",
                "l0",
                "affine_connection",
                "type",
            ),
        ),
        (
            "sae.safetensors",
            "cfg.json",
            {"d_in": D_IN, "k": 2, "expansion_factor": 2},
            "sparsify",
            ("d_in", "k", "num_latents", "expansion_factor", "signed", "transcode", "activation"),
        ),
        ("ae.pt", "config.json", TOPK, "dl", ("trainer",)),
    ]
    tensors = {"saelens": plain, "gemma": gemma(), "sparsify": sparsify}
    refused = 0
    for weights, config, described, family, keys in families:
        folder = tmp_path / family
        folder.mkdir()
        if family == "dl":
            torch.save(topk(), folder / weights)
        else:
            save_file(tensors[family], folder / weights)
        (folder / config).write_text(json.dumps(described))
        assert one_line(folder) is None
        for key, value in itertools.product(keys, ODD):
            (folder / config).write_text(json.dumps({**described, key: value}))
            refused += one_line(folder) is not None
        for value in ODD:
            (folder / config).write_text(json.dumps(value))
            empty = value == {} and family == "gemma"  # it then says nothing, as in release 1
            assert (one_line(folder) is None) == empty
    assert refused > 200
    for key, value in itertools.product(("dict_class", "k", "layer", "submodule_name"), ODD):
        trainer = {**TOPK["trainer"], key: value}
        (tmp_path / "dl" / "config.json").write_text(json.dumps({"trainer": trainer}))
        one_line(tmp_path / "dl")
    for key, value in itertools.product(
        ("sae_lens_version", "hook_name", "model_from_pretrained_kwargs", "held_out"), ODD
    ):
        given = {**saelens, "metadata": {"sae_lens_version": "6.54.12", key: value}}
        (tmp_path / "saelens" / "cfg.json").write_text(json.dumps(given))
        one_line(tmp_path / "saelens")


def npz(arrays: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def archive(members: list[tuple[str, bytes]], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as made:
        for name, data in members:
            made.writestr(name, data)
    return stream.getvalue()


def npy(shape: tuple[int, ...], data: bytes, *, header: bytes | None = None) -> bytes:
    text = header or f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text = text.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def arrays(**more: Any) -> dict[str, Any]:
    return {**{n: v.numpy() for n, v in gemma().items()}, **more}


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
def test_any_floating_point_is_read(kind: str, tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    W = g.standard_normal((D_IN, D_SAE)).astype("f2")
    given = {n: v.astype(kind) for n, v in arrays(W_enc=W).items()}
    given["W_dec"] = np.asfortranarray(given["W_dec"])
    (tmp_path / "params.npz").write_bytes(npz(given))
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(0))
    pre = x @ torch.from_numpy(W.astype("f4"))
    wanted = torch.where(pre > 1, pre, 0.0)
    assert wanted.any()
    torch.testing.assert_close(load(tmp_path).encode(x), wanted)


def bomb() -> bytes:
    """80 MB of zeros, each array of the shape it must have, in 80 kB."""
    n = 2_000_000
    shapes = {"W_enc": (D_IN, n), "W_dec": (n, D_IN), "b_enc": n, "b_dec": D_IN, "threshold": n}
    stream = io.BytesIO()
    zeros: dict[str, Any] = {name: np.zeros(shape, "f4") for name, shape in shapes.items()}
    np.savez_compressed(stream, **zeros)
    return stream.getvalue()


NPZ = {
    "whole numbers": npz(arrays(W_enc=np.ones((4, 8), int))),
    "complex": npz(arrays(W_enc=np.ones((4, 8), complex))),
    "text": npz(arrays(W_enc=np.full((4, 8), "a"))),
    "records": npz(arrays(W_enc=np.zeros((4, 8), dtype=[("a", "f4")]))),
    "objects": npz(arrays(W_enc=np.full((4, 8), None))),
    "no matrix": npz(arrays(W_enc=np.ones(4, "f4"))),
    "nothing": npz(arrays(W_enc=np.ones((0, 8), "f4"))),
    "beyond float32": npz(arrays(W_enc=np.full((4, 8), 1e300))),
    "not a number": npz(arrays(W_enc=np.full((4, 8), np.nan, "f4"))),
    "two of one name": npz(arrays(w_enc=np.ones((4, 8), "f4"))),
    "a negative shape": archive([("W_enc.npy", npy((-4, 8), bytes(128)))]),
    "16 TB": archive([("W_enc.npy", npy((10**12, 4), bytes(1000)))]),
    "a header that is code": archive([("W_enc.npy", npy((), b"", header=b"__import__('os')"))]),
    "a header of brackets": archive([("W_enc.npy", npy((), b"", header=b"(" * 2000))]),
    "a bomb": bomb(),
    "no array": archive([("W_enc.npy", b"hello")]),
    "another compression": archive([("W_enc.npy", npy((4, 8), bytes(128)))], zipfile.ZIP_LZMA),
    "empty": archive([]),
    "no zip": b"PK\x03\x04nothing",
}


@pytest.mark.parametrize("what", NPZ)
def test_archives(what: str, tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(NPZ[what])
    assert one_line(tmp_path) is not None


def test_an_encrypted_archive(tmp_path: Path) -> None:
    data = bytearray(npz(arrays()))
    data[data.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "params.npz").write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match="encrypted"):
        load(tmp_path)


def pt(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_module=pickle)
    return stream.getvalue()


def state(**more: Any) -> bytes:
    return pt({**topk(), **more})


def repacked(data: bytes, table: bytes | None, how: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save's with another table of tensors, or stored in another way."""
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        members = [(m.filename, made.read(m)) for m in made.infolist()]
    return archive([(n, table if table and n.endswith("data.pkl") else b) for n, b in members], how)


@pytest.mark.parametrize(
    "what",
    [
        "a view of 4 TB",
        "sparse",
        "complex",
        "whole numbers",
        "a list",
        "numbers for names",
        "a dictionary inside",
        "k of 0",
        "k of two",
        "k that is no number",
        "k above d_sae",
        "legacy",
        "compressed",
        "deep",
        "empty",
        "a pickle",
        "code",
    ],
)
def test_state_dicts(what: str, tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    legacy = io.BytesIO()
    torch.save(topk(), legacy, _use_new_zipfile_serialization=False)
    made = {
        "a view of 4 TB": lambda: state(**{"encoder.weight": torch.ones(1).expand(2**20, 2**20)}),
        "sparse": lambda: state(**{"encoder.weight": torch.ones(8, 4).to_sparse()}),
        "complex": lambda: state(**{"encoder.weight": torch.ones(8, 4, dtype=torch.complex64)}),
        "whole numbers": lambda: state(**{"encoder.weight": torch.ones(8, 4, dtype=torch.int)}),
        "a list": lambda: pt([1, 2, 3]),
        "numbers for names": lambda: pt({1: torch.ones(2)}),
        "a dictionary inside": lambda: pt({"a": {"b": torch.ones(2)}}),
        "k of 0": lambda: state(k=torch.tensor(0)),
        "k of two": lambda: state(k=torch.tensor([2, 2])),
        "k that is no number": lambda: state(k=torch.tensor(float("nan"))),
        "k above d_sae": lambda: state(k=torch.tensor(99)),
        "legacy": legacy.getvalue,
        "compressed": lambda: repacked(state(), None, zipfile.ZIP_DEFLATED),
        "deep": lambda: repacked(state(), b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b"."),
        "empty": bytes,
        "a pickle": lambda: pickle.dumps(Marker(sign)),
        "code": lambda: state(b_dec=Marker(sign)),
    }[what]()
    (tmp_path / "ae.pt").write_bytes(made)
    (tmp_path / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}})
    )
    assert one_line(tmp_path) is not None
    assert not sign.exists()


def test_a_table_that_claims_more_than_is_stored_reads_no_other_memory(tmp_path: Path) -> None:
    data = state()
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        table = next(made.read(m) for m in made.infolist() if m.filename.endswith("data.pkl"))
    lie = table.replace(b"K t", b"J" + struct.pack("<i", 2**30) + b"t", 1)
    assert lie != table
    (tmp_path / "ae.pt").write_bytes(repacked(data, lie))
    (tmp_path / "config.json").write_text(json.dumps(TOPK))
    sae = load(tmp_path)  # the tensor itself is in its place
    assert torch.equal(sae.W_enc, torch.ones(D_IN, D_SAE))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_safetensors_of_other_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {**gemma(), "W_enc": torch.ones(D_IN, D_SAE).to(dtype)}
    (tmp_path / "params.safetensors").write_bytes(save(tensors))
    with pytest.raises(ArtefactError, match="W_enc is of the wrong dtype"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "hf://", "hf://a", "hf://a/b/../c"])
def test_names_that_no_folder_has(name: str) -> None:
    with pytest.raises((ArtefactError, InputError)):
        load(name)
