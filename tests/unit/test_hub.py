"""The hub: what its own functions are called with, files of the same layout, cards it can read."""

import inspect
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.convert import ConvertConfig
from sae.core.base import SparseAutoencoder
from sae.formats import format_named
from sae.formats.hub import HubFolder
from sae.formats.load import load
from sae.formats.upload import upload
from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REAL = {
    "snapshot_download": inspect.signature(huggingface_hub.snapshot_download),
    **{name: inspect.signature(getattr(huggingface_hub.HfApi, name))
       for name in ("create_repo", "upload_folder")},
}  # fmt: skip
"""what the hub's functions take, before they are replaced here"""
EVALUATION = {
    "protocol": {"version": 1, "harvest": "abc", "site": "blocks.9.hook_resid_post",
                 "split": "held_out", "rows": 1000},
    "protocol_hash": "f" * 64,
    "reconstruction": {"rows": 1000, "l0": 32.0, "fvu": 0.164, "fvu_interval": 0.002,
                       "cosine": 0.91, "norm_ratio": 0.97, "dead_fraction": 0.015},
    "downstream": {"tokens": 8192, "delta_ce": 0.21, "kl": 0.2, "recovered_zero": 0.97,
                   "recovered_mean": None},
}  # fmt: skip


def make(kind: str = "topk") -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = TopKSAE(TopKConfig(d_sae=12, k=3), 5)
    sae.metadata = {"site": "blocks.9.hook_resid_post", "model": "acme/tiny", "context": 64}
    return sae.eval()


class Hub:
    """A hub on disk, behind the real functions' signatures."""

    def __init__(self, folder: Path) -> None:
        self.repos, self.cache = folder / "repos", folder / "cache"
        self.calls: list[dict[str, Any]] = []

    def repo(self, name: str) -> Path:
        path = self.repos / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
        """Copy what the patterns allow, as the hub's own matching does."""
        call = REAL["snapshot_download"].bind(*args, **kwargs).arguments
        self.calls.append(call)
        source = self.repos / call["repo_id"]
        if not source.is_dir():
            raise LocalEntryNotFoundError(f"Cannot find {call['repo_id']}\nand a long story")
        owner_name = call["repo_id"].replace("/", "--")
        snapshot = self.cache / f"models--{owner_name}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        files = [
            path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()
        ]
        wanted = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=call["allow_patterns"]
        )
        for name in wanted:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, snapshot / name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_names() -> None:
    def parts(name: str) -> tuple[str, str, str | None]:
        place = HubFolder.parse(name)
        return place.repo, place.folder, place.revision

    assert parts("hf://a/b") == ("a/b", "", None)
    assert parts("hf://a/b/c/d") == ("a/b", "c/d", None)
    assert parts("hf://a/b/c/d@v1.0") == ("a/b", "c/d", "v1.0")
    assert parts("hf://a/b@refs/pr/3/c") == ("a/b", "c", "refs/pr/3")
    assert parts("hf://a/b@main/c/d") == ("a/b", "c/d", "main")
    assert parts("hf://a/b/c@refs/pr/3") == ("a/b", "c", "refs/pr/3")
    assert str(HubFolder.parse("hf://a/b@main/c")) == "hf://a/b/c@main"
    for wrong in ("hf://", "hf://alone", "hf://a/b@", "hf://a/b/../c"):
        with pytest.raises(InputError, match="not a folder on the hub"):
            HubFolder.parse(wrong)


def test_gemma_scope_by_its_name(hub: Hub) -> None:
    """The published layout; nothing beside the folder asked for is fetched."""
    from sae.architectures.jumprelu import JumpReLUConfig, JumpReLUSAE

    sae = JumpReLUSAE(JumpReLUConfig(d_sae=12), 5).eval()
    repo = hub.repo("google/gemma-scope-2b-pt-res")
    for l0 in (22, 82):
        place = repo / "layer_12" / "width_16k" / f"average_l0_{l0}"
        format_named("gemma_scope").write(sae, place)
    (repo / "README.md").write_text("of the repository")
    name = "hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    found = load(name)
    x = torch.randn(9, 5)
    torch.testing.assert_close(found.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    assert found.metadata["claimed"] == {"l0": 82.0}
    assert found.metadata["site"] == "blocks.12.hook_resid_post"
    assert found.metadata["model"] == "google/gemma-2-2b"
    assert found.metadata["source"] == f"{name}@{COMMIT}"
    (call,) = hub.calls
    assert call["repo_id"] == "google/gemma-scope-2b-pt-res"
    assert call["revision"] is None
    assert "layer_12/width_16k/average_l0_82/params.npz" in call["allow_patterns"]
    fetched = {path.name for path in hub.cache.rglob("*") if path.is_file()}
    assert fetched == {"params.npz"}
    assert "average_l0_22" not in {path.name for path in hub.cache.rglob("*")}


@pytest.mark.parametrize("name", ["saescope", "saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("folder", ["", "layers.5"])
def test_every_format_by_its_name(name: str, folder: str, hub: Hub) -> None:
    sae, x = make(), torch.randn(9, 5)
    format_named(name).write(sae, hub.repo("me/saes") / folder / "at")
    found = load("/".join(part for part in ("hf://me/saes", folder, "at@v2") if part))
    torch.testing.assert_close(found.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    assert hub.calls[0]["revision"] == "v2"


def test_what_is_not_there_is_one_clear_error(hub: Hub) -> None:
    with pytest.raises(ArtefactError, match=r"hf://no/where: cannot be fetched: Cannot find") as e:
        load("hf://no/where")
    assert "long story" not in str(e.value)
    hub.repo("me/empty")
    with pytest.raises(ArtefactError, match="hf://me/empty/here: no SAE here"):
        load("hf://me/empty/here")


# ---- upload ---------------------------------------------------------------------------------


class Api:
    """HfApi's two methods, behind their real signatures; what is uploaded is kept."""

    def __init__(self, kept: Path, token: str | None) -> None:
        self.kept, self.token = kept, token
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        bound = REAL["create_repo"].bind(self, *args, **kwargs)
        self.calls.append(("create_repo", bound.arguments))

    def upload_folder(self, *args: Any, **kwargs: Any) -> Any:
        bound = REAL["upload_folder"].bind(self, *args, **kwargs)
        self.calls.append(("upload_folder", bound.arguments))
        into = self.kept / bound.arguments["repo_id"] / (bound.arguments["path_in_repo"] or "")
        shutil.copytree(bound.arguments["folder_path"], into, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{bound.arguments['repo_id']}/commit/1")


@pytest.fixture
def apis(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[Api]:
    made: list[Api] = []

    class Fake(Api):
        def __init__(self, token: str | None = None) -> None:
            super().__init__(hub.repos, token)
            made.append(self)

    monkeypatch.setattr(huggingface_hub, "HfApi", Fake)
    return made


def _card(path: Path) -> tuple[Any, str]:
    """The front matter as the hub's own reader has it, and the text."""
    card = huggingface_hub.ModelCard(path.read_text())
    return card.data, card.text


@pytest.mark.parametrize("to", ["saescope", "saelens"])
def test_uploaded_with_a_card_and_loaded_again(
    to: str, hub: Hub, apis: list[Api], tmp_path: Path
) -> None:
    sae, x = make(), torch.randn(9, 5)
    run = tmp_path / "run"
    sae.save(run / "sae")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    address = upload(run, "me/saes", to=to, path_in_repo="layer_9", private=True, license="mit",
                     token="secret")  # fmt: skip
    assert address == "https://hub/me/saes/commit/1"
    (api,) = apis
    assert api.token == "secret"
    (created, how), (uploaded, what) = api.calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert how["repo_id"] == "me/saes"
    assert how["private"] is True
    assert how["exist_ok"] is True
    assert what["path_in_repo"] == "layer_9"
    place = hub.repos / "me" / "saes" / "layer_9"
    data, text = _card(place / "README.md")
    assert data.license == "mit"
    assert data.base_model == "acme/tiny"
    assert "sparse-autoencoder" in data.tags
    results = {each.metric_type: each.metric_value for each in data.eval_results}
    assert results == {"l0": 32.0, "fvu": 0.164, "cosine": 0.91, "norm_ratio": 0.97,
                       "dead_fraction": 0.015, "delta_ce": 0.21, "kl": 0.2,
                       "recovered_zero": 0.97}  # fmt: skip
    assert "held out" in text
    assert "ffffffffffff" in text
    assert 'sae.load("hf://me/saes/layer_9")' in text
    again = load("hf://me/saes/layer_9")
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)


def test_nothing_measured_is_said_so(hub: Hub, apis: list[Api]) -> None:
    upload(make(), "me/saes")
    data, text = _card(hub.repos / "me" / "saes" / "README.md")
    assert "Nothing was measured" in text
    assert not data.eval_results
    assert apis[0].calls[1][1]["path_in_repo"] is None


def test_what_training_measured_is_stated(hub: Hub, apis: list[Api]) -> None:
    sae = make()
    sae.metadata["held_out"] = {"rows": 500, "l0": 3.0, "fvu": 0.25, "cosine": 0.9}
    upload(sae, "me/saes")
    data, text = _card(hub.repos / "me" / "saes" / "README.md")
    assert {each.metric_type for each in data.eval_results} == {"l0", "fvu", "cosine"}
    assert "as the training ended" in text
    assert len(apis) == 1


def test_wrong_names_reach_no_hub(apis: list[Api]) -> None:
    for name in ("alone", "a/b/c", "a b/c"):
        with pytest.raises(InputError, match=r"not a repository .*allowed: owner/name"):
            upload(make(), name)
    with pytest.raises(InputError, match="no such format"):
        upload(make(), "me/saes", to="npz")
    assert not apis


# ---- the command ----------------------------------------------------------------------------


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save(tmp_path / "ours")
    out = tmp_path / "exported"
    assert main(["convert", str(tmp_path / "ours"), "--to", "saelens", "--out", str(out)]) == 0
    assert "topk, d_in 5, d_sae 12 (saelens)" in "".join(capsys.readouterr())
    back = tmp_path / "back"
    assert main(["convert", str(out), "--out", str(back)]) == 0
    x = torch.randn(9, 5)
    assert torch.equal(load(back).encode(x), make().encode(x))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --out, --upload or both"),
        (["--out", "x", "--claimed-l0", "3"], "claims are checked on a harvest"),
        (["--to", "gemma_scope", "--out", "x"], "cannot hold this architecture .*'topk'"),
    ],
)
def test_convert_command_errors(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("x").exists()


def test_convert_configuration_is_checked() -> None:
    with pytest.raises(InputError, match="no such format"):
        ConvertConfig(source="x", to="npz")
    with pytest.raises(InputError, match="input_scale: out of range"):
        ConvertConfig(source="x", input_scale=0.0)


def test_convert_uploads(
    hub: Hub, apis: list[Api], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save(tmp_path / "run" / "sae")
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(EVALUATION))
    words = ["convert", str(tmp_path / "run"), "--to", "saelens", "--upload", "me/saes"]
    assert main(words) == 0
    assert "https://hub/me/saes/commit/1" in "".join(capsys.readouterr())
    assert len(_card(hub.repos / "me" / "saes" / "README.md")[0].eval_results) == 8
    assert len(apis) == 1


def test_convert_checks_on_a_harvest(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import make_tiny_harvest

    harvest = make_tiny_harvest(tmp_path / "harvest", tiny_folder)
    directions = torch.linalg.qr(torch.randn(32, 32)).Q
    both = torch.cat([directions, -directions])
    sae = TopKSAE(TopKConfig(d_sae=64, k=32), 32)  # x itself, as sums of opposite directions
    sae.load_state_dict({"W_enc_T": both, "W_dec": both, "b_enc": torch.zeros(64),
                         "b_dec": torch.zeros(32)})  # fmt: skip
    sae.metadata = {"site": "blocks.1.hook_resid_post"}
    sae.save(tmp_path / "ours")
    out = tmp_path / "out"
    words = ["convert", str(tmp_path / "ours"), "--to", "saelens", "--out", str(out),
             "--harvest", str(harvest), "--rows", "128"]  # fmt: skip
    assert main(words) == 0
    said = "".join(capsys.readouterr())
    assert "L0 3" in said
    assert "FVU 0.0000" in said
    assert main([*words[:-4], "--harvest", str(harvest), "--claimed-l0", "4"]) == 2
    assert "not 4 as claimed" in capsys.readouterr().err


def test_a_model_without_safetensors_is_fetched_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older models on the hub have pytorch_model.bin alone; others' are not fetched twice."""
    from activations.models.files import folder_of

    asked: list[list[str]] = []

    def download(_spec: str, *, allow_patterns: list[str], **_options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder_of("someone/old", None)
    assert asked[1:] == [["pytorch_model*.bin"]]
    assert not any(pattern.endswith(".bin") for pattern in asked[0])
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    folder_of("someone/new", None)
    assert len(asked) == 1
