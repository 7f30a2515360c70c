"""The throw-away environment of each library compared with: one virtual environment apiece."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from saescope.artefact import write_bytes
from saescope.errors import ArtefactError
from saescope.paths import remove
from saescope.progress import say

TORCH = "torch==2.13.0"
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library, pinned, and the script that trains with it."""

    name: str
    package: str
    version: str
    script: Path
    alone: tuple[str, ...] = ()
    """installed without what they ask for (which would bring another torch)"""
    needs: tuple[str, ...] = ()
    """what is really imported, with dependencies, torch held"""

    @property
    def requirement(self) -> str:
        """As pip reads it."""
        return f"{self.package}=={self.version}"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="SAELens",
            package="sae-lens",
            version="6.54.12",
            script=HERE / "in_saelens.py",
        ),
        Peer(
            name="dictionary_learning",
            package="dictionary-learning",
            version="0.1.0",
            script=HERE / "in_dictionary_learning.py",
            # its pinned nnsight asks for torchvision, which would decide the build of torch
            alone=("dictionary-learning==0.1.0", "nnsight==0.3.7"),
            needs=(
                "accelerate",
                "diffusers",
                "einops",
                "python-socketio[client]",
                "tqdm",
                "transformers",
                "wandb",
            ),
        ),
    )
}
"""whose SAEs are trained and compared with ours"""

STEPPED = {
    **PEERS,
    # its own trainer harvests as it trains, so only its steps are compared
    "sparsify": Peer(
        name="sparsify",
        package="eai-sparsify",
        version="1.3.3",
        script=HERE / "in_steps" / "in_sparsify.py",
    ),
}
"""whose training steps are timed"""


DASHBOARDS = Peer(
    name="SAEDashboard",
    package="sae-dashboard",
    version="0.8.0",
    script=HERE / "in_saedashboard.py",
    # its decode-clt brings a torchvision of another torch; it holds NumPy below 2, which later
    # releases of pyarrow refuse
    alone=("sae-dashboard==0.8.0",),
    needs=(
        "dataclasses-json<0.7",
        "datasets<4",
        "eindex-callum",
        "matplotlib",
        "numpy<2",
        "pyarrow<21",
        "rich<14",
        "sae-lens==6.54.12",
        "safetensors<0.5",
        "transformer-lens<3",
        "transformers<4.57",
    ),
)
"""whose pages of features are compared with ours"""

PROBES = Peer(
    name="sae-probes",
    package="sae-probes",
    version="0.4.2",
    script=HERE / "in_sae_probes.py",
)
"""whose probing of an SAE is compared with ours"""

CIRCUITS = Peer(
    name="circuit-tracer",
    package="circuit-tracer",
    version="0.5.0",
    script=HERE / "in_circuit_tracer.py",
)
"""whose features and attribution graphs of our transcoders are compared with ours"""

ABSORPTION = Peer(
    name="SAEBench",
    package="sae-bench",
    version="0.6.0",
    script=HERE / "in_saebench.py",
    # it asks for torchvision, which would decide the build of torch, and for NumPy below 2
    alone=("sae-bench==0.6.0",),
    needs=("pandas", "sae-lens==6.54.12", "scikit-learn", "tabulate"),
)
"""whose absorption of first letters, and core metrics, are compared with ours"""


def python_of(peer: Peer, work: Path) -> Path:
    """The interpreter of a peer's environment, made if it is not there yet.

    Raises ArtefactError if it cannot be made.
    """
    folder = work / "environments" / peer.package
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists() and ready.read_text(encoding="utf-8").strip() == peer.requirement:
        return python
    say(f"{peer.name}: making {folder} (some minutes)")
    remove(folder)
    _run([sys.executable, "-m", "venv", str(folder)], peer)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, TORCH], peer)  # first and alone: nothing else decides which build is taken
    held = folder / "constraints.txt"
    write_bytes(held, f"{TORCH}\n".encode())
    if peer.alone:
        _run([*pip, "--no-deps", *peer.alone], peer)
    _run([*pip, "--constraint", str(held), *(peer.needs or (peer.requirement,))], peer)
    write_bytes(ready, f"{peer.requirement}\n".encode())
    return python


def _run(command: list[str], peer: Peer) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ArtefactError(
            f"the environment could not be made: {done.stderr.strip()[-600:]}", where=peer.name
        )
