"""Measurements during training: metrics.jsonl always; W&B or TensorBoard besides, when asked for.

metrics.jsonl has one line of JSON a measurement, in the order of the steps. Each ends with a
checksum of itself and of all lines before it: one that is changed, lost or moved is found.
"""

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from saescope.artefact import DamagedError, fsync_path, sha256_json, write_bytes
from saescope.errors import InputError, check_choice
from saescope.progress import say
from saescope.seals import FileSeal, crc32c_text

SinkKind = Literal["none", "wandb", "tensorboard"]
_MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}
_PROJECT = "saescope"
CHECKSUM = "crc32c"
NOTHING = "00000000"
"""the checksum of no lines"""


class Sink(Protocol):
    """Somewhere else that measurements go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name ("held_out/fvu") at a step."""
        ...

    def close(self) -> None:
        """Send what is waiting; called once, at the end of the run."""
        ...


class MetricsLog:
    """Append measurements; a resumed run first drops what came after its checkpoint.

    Args: sealed is what `seal` gave when that checkpoint was taken; None if nothing is known.

    Raises DamagedError if a line is not as it was written, or lines are missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int = 0,
        sinks: Sequence[Sink] = (),
        sealed: FileSeal | None = None,
    ) -> None:
        self.path = path
        self.sinks = tuple(sinks)
        lines = read_metrics(path) if path.exists() and resume_step else []
        data, self._crc = _text(line for line in lines if line["step"] <= resume_step)
        if sealed is not None and sealed != {"bytes": len(data), CHECKSUM: self._crc}:
            if path.exists():
                raise DamagedError(
                    "lines that were there when the checkpoint was taken are missing; put the file "
                    "back, or move it away: the run then goes on without what it says",
                    where=str(path),
                    kind="truncated",
                )
            say(f"{path}: is missing; measurements up to step {resume_step:,} are lost")
        write_bytes(path, data)

    def append(self, step: int, **values: Any) -> None:
        """Add one line and flush it."""
        line, self._crc = _sealed({"step": step, **values}, self._crc)
        with self.path.open("ab") as stream:
            stream.write(line)
        for sink in self.sinks:
            sink.log(step, flattened(values))

    def seal(self) -> FileSeal:
        """The file's size and checksum as it is now; it is flushed to the disk."""
        fsync_path(self.path)
        return {"bytes": self.path.stat().st_size, CHECKSUM: self._crc}

    def close(self) -> None:
        """Close the sinks."""
        for sink in self.sinks:
            sink.close()


def _sealed(values: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """A line that ends with the checksum of it and of all ahead of it; the file's after it.

    Args: before is the file's checksum up to the line.
    """
    crc = crc32c_text(json.dumps(values, allow_nan=False).encode(), before)
    line = json.dumps({**values, CHECKSUM: crc}, allow_nan=False).encode() + b"\n"
    return line, crc32c_text(line, before)


def _text(measurements: Iterable[Mapping[str, Any]]) -> tuple[bytes, str]:
    lines, crc = [], NOTHING
    for values in measurements:
        line, crc = _sealed(values, crc)
        lines.append(line)
    return b"".join(lines), crc


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl (a torn last line, after a kill, is not one).

    Raises DamagedError, with the number of the line, if one is not as it was written.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    found = [_parsed(line, number, path) for number, line in enumerate(lines, 1)]
    if _is_whole(rest[:-1]):  # a line, and then something else than its end
        raise DamagedError(f"line {len(lines) + 1} is damaged", where=str(path))
    if not any(CHECKSUM in values for values in found):  # of older versions
        return found
    crc = NOTHING
    for number, (line, values) in enumerate(zip(lines, found, strict=True), 1):
        values.pop(CHECKSUM, None)
        whole, crc = _sealed(values, crc)
        if whole != line + b"\n":
            raise DamagedError(f"line {number} is damaged, or lines ahead of it", where=str(path))
    return found


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise DamagedError(f"line {number} is damaged", where=str(path))
    return values


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested tables, named by their path.

    >>> flattened({"tokens": 5, "train": {"fvu": 0.5, "kind": "topk"}})
    {'tokens': 5.0, 'train/fvu': 0.5}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def check_sink(kind: SinkKind) -> None:
    """Raise InputError if a sink is not one of the known, or its package is not installed."""
    check_choice("no such telemetry", "telemetry", kind, get_args(SinkKind))
    if kind != "none":
        _module(kind)


def _module(kind: str) -> Any:
    try:
        return importlib.import_module(_MODULES[kind])
    except ImportError as error:
        raise InputError(
            f"the package {_PACKAGES[kind]} is not installed (pip install {_PACKAGES[kind]})",
            where="telemetry",
            given=kind,
            allowed="none, or what is installed",
        ) from error


def sinks(
    kind: SinkKind,
    folder: Path,
    run_name: str,
    config: Mapping[str, Any],
    *,
    tag: str = "",
    resume_step: int = 0,
) -> list[Sink]:
    """What measurements of a run go to besides metrics.jsonl: nothing, W&B, or TensorBoard.

    A resumed run goes on in the same W&B run or TensorBoard folder, and no step is there twice.

    Args:
        folder: the run's; TensorBoard's files go into its `tensorboard`, W&B's into its `wandb`.
        config: JSON-able settings, shown beside the run.
        tag: identifies the run's configuration; with the folder it is the W&B run's identity.
        resume_step: step of the checkpoint that the run goes on from; 0 for a new run.

    Raises InputError for an unknown kind, or if its package is not installed.
    """
    check_sink(kind)
    if kind == "wandb":
        return [WandbSink(folder, run_name, config, tag=tag)]
    if kind == "tensorboard":
        return [TensorBoardSink(folder, config, resume_step=resume_step)]
    return []


class WandbSink:
    """Weights & Biases; its own environment variables (WANDB_MODE, WANDB_ENTITY) hold.

    One folder and tag are one run of W&B's, so a run that is started anew there goes on in it.
    """

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any], *, tag: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = _module("wandb").init(
            project=_PROJECT,
            name=run_name,
            id=sha256_json({"folder": str(folder.resolve()), "tag": tag})[:16],
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step; what the run has from before a kill is not sent again."""
        # a resumed run measures the same numbers at the same steps, to the last bit
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class TensorBoardSink:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume_step: int) -> None:
        # TensorBoard then does not show what an earlier process wrote from that step on
        purge = resume_step + 1 if resume_step else None
        self._writer = _module("tensorboard").SummaryWriter(
            log_dir=str(folder / "tensorboard"), purge_step=purge
        )
        if not resume_step:
            settings = json.dumps(dict(config), indent=1, default=str)
            self._writer.add_text("config", f"```\n{settings}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
