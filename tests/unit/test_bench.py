"""Timing steps and operations: same tensors for all, rows that say what was timed. No times."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks import steps, steps_data
from benchmarks.peers.stepping import DENSE, OURS, Worker
from benchmarks.performance import TARGETS, comparisons, is_narrow, page, verdicts
from benchmarks.performance_choices import section, slower
from sae.bench import rows
from sae.bench.dense import KINDS, DenseStep, _OneDNNLinear, has_onednn
from sae.bench.inputs import Inputs, Shape, planted, prepare
from sae.bench.operations import OPERATIONS, make_operation, make_problem
from sae.bench.steps import DENSE as DENSE_SETTINGS
from sae.bench.steps import Setting, make_stepper
from sae.bench.timing import interleaved
from sae.commands.bench import BenchConfig, bench
from sae.kernels import cpp_backend, fastest
from sae.kernels.operations import by_torch
from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError

SHAPE = Shape(batch=96, d_in=24, d_sae=200, k=6)
TINY = "64x16x96x4"


def inputs(kind: str = "topk", dead: int = 0, l0: float = SHAPE.k) -> Inputs:
    x, weights = planted(SHAPE)
    return prepare(x, weights, kind, l0, dead=dead)


# ---- what is stepped on -------------------------------------------------------------------------


def test_planted_rows_are_centred_and_of_unit_coordinates() -> None:
    x, weights = planted(SHAPE)
    rows_ = x.flatten(0, 1)
    assert x.shape == (3, SHAPE.batch, SHAPE.d_in)
    assert rows_.mean(0).abs().max() < 1e-5
    assert float(rows_.square().sum(1).mean()) == pytest.approx(SHAPE.d_in, rel=1e-5)
    assert torch.allclose(weights.W_dec.norm(dim=1), torch.ones(SHAPE.d_sae), atol=1e-5)
    assert torch.equal(planted(SHAPE)[0], x)
    assert not torch.equal(planted(SHAPE, seed=1)[0], x)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_features_fire_as_are_asked_for(kind: str) -> None:
    made = inputs(kind)
    pre = made.x.flatten(0, 1) @ made.W_enc_T.T + made.b_enc
    above = (pre > made.threshold).sum(1).double()
    if kind in ("relu", "jumprelu"):
        assert float(above.mean()) == pytest.approx(SHAPE.k, abs=0.02)
    else:
        assert float((above < SHAPE.k).double().mean()) < 0.015  # a hundredth, or a row more
    if kind == "jumprelu":
        band = (pre > made.threshold - 1).sum(1).double()
        assert float(band.mean()) == pytest.approx(4 * SHAPE.k, abs=0.1)


def test_dead_features_answer_and_are_never_chosen() -> None:
    made = inputs(dead=20)
    pre = made.x[0] @ made.W_enc_T.T + made.b_enc
    assert int(made.dead.sum()) == 20
    enough = (pre > 0.1).sum(1) >= SHAPE.k
    assert float(enough.double().mean()) > 0.95
    assert not made.dead[pre[enough].topk(SHAPE.k, dim=1).indices].any()
    assert 0.3 < float((pre[:, made.dead] > 0).double().mean()) < 0.7


def test_more_dead_features_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="dead: out of range"):
        inputs(dead=SHAPE.d_sae)


def test_inputs_come_back_from_their_files(tmp_path: Path) -> None:
    made = inputs(dead=3)
    made.save(tmp_path)
    back = Inputs.load(tmp_path)
    assert all(torch.equal(value, getattr(back, name)) for name, value in vars(made).items())
    (tmp_path / "dead.npy").unlink()
    with pytest.raises(ArtefactError, match="no inputs here"):
        Inputs.load(tmp_path)


@pytest.mark.parametrize("text", ["", "2048x768x8192", "2048x768x8192xk", "1x2x3x4x5", "0x2x3x1"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="shape"):
        Shape.parse(text)


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 5, 40])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_dense_step_is_the_trainers(kind: str, dead: int) -> None:
    """The same loss, AuxK included, and the same projected gradient norm."""
    made = inputs(kind, dead)
    found = {}
    for name in ("dense", "reference", "torch"):
        stepper = make_stepper(Setting(name), made, kind, SHAPE.k)
        stepper.mark(made.dead)
        stepper.step(made.x[0])
        found[name] = stepper.found
    for name in ("loss", "grad_norm", "l0", "dead"):
        assert found["dense"][name] == pytest.approx(found["reference"][name], rel=1e-4)
        assert found["torch"][name] == pytest.approx(found["reference"][name], rel=1e-4)
    assert found["dense"]["dead"] == dead


@pytest.mark.parametrize("setting", [*DENSE_SETTINGS, "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_computes_the_same(kind: str, setting: str) -> None:
    if setting == "dense+onednn" and not has_onednn():
        pytest.skip("this torch has no such operator")
    made = inputs(kind)
    truth = make_stepper(Setting("reference"), made, kind, SHAPE.k).measure(made.x[0])
    found = make_stepper(Setting(setting), made, kind, SHAPE.k).measure(made.x[0])
    rel = 0.02 if setting == "dense+bf16" else 1e-4
    assert found == {name: pytest.approx(value, rel=rel) for name, value in truth.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_hardly_move_the_weights(kind: str) -> None:
    """All libraries step on the same weights, so that L0 stays what it was."""
    made = inputs(kind)
    for name in ("dense", "torch"):
        stepper = make_stepper(Setting(name), made, kind, SHAPE.k)
        before = stepper.measure(made.x[0])
        for x in made.x:
            stepper.step(x)
        after = stepper.measure(made.x[0])
        assert after == {name: pytest.approx(value, rel=2e-3) for name, value in before.items()}


@pytest.mark.skipif(not has_onednn(), reason="this torch has no such operator")
def test_onednn_has_the_gradient_of_a_linear_map() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(size, requires_grad=True) for size in ((7, 5), (9, 5), (9,))]
    weight = torch.randn(7, 9)
    ours = torch.autograd.grad((_OneDNNLinear.apply(*leaves) * weight).sum(), leaves)
    truth = torch.autograd.grad((functional.linear(*leaves) * weight).sum(), leaves)
    for found, expected in zip(ours, truth, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_setting_is_asked_for_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", "reference")
    monkeypatch.delenv("SAESCOPE_SCREEN", raising=False)
    with Setting("torch").active(torch.zeros(1)):
        assert (os.environ["SAESCOPE_KERNELS"], os.environ["SAESCOPE_SCREEN"]) == ("torch", "none")
    assert os.environ["SAESCOPE_KERNELS"] == "reference"
    assert "SAESCOPE_SCREEN" not in os.environ


def test_kernels_that_cannot_run_are_not_replaced_in_silence() -> None:
    with (
        pytest.raises(InputError, match="settings: these kernels cannot run here"),
        Setting("cpu+int8").active(torch.zeros(1, dtype=torch.float64)),
    ):
        pass


def test_unknown_settings_and_architectures_are_refused() -> None:
    with pytest.raises(InputError, match="settings: no such setting"):
        Setting("fast")
    with pytest.raises(InputError, match="no dense step"):
        DenseStep(inputs(), "matryoshka", SHAPE.k)
    with pytest.raises(InputError, match="reads or writes other rows"):
        make_stepper(Setting("torch"), inputs(), "transcoder", SHAPE.k)


# ---- timing and rows ----------------------------------------------------------------------------


def test_calls_are_made_in_turn_and_the_first_is_not_timed() -> None:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    times = interleaved(calls, rounds=2)
    assert made == [*"abc", *"abc", *"bca"]
    assert [len(times[name].seconds) for name in "abc"] == [2, 2, 2]
    assert all(len(each.cpu_seconds) == 2 for each in times.values())


def test_rows_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="holds other columns"):
        rows.append(path, [])
    with pytest.raises(InputError, match="holds other columns"):
        bench(BenchConfig(shapes=(TINY,), settings=("torch",), out=str(path)))
    assert path.read_text() == "a,b\n1,2\n"


# ---- saescope bench -----------------------------------------------------------------------------


def test_bench_writes_a_row_for_everything_it_times(tmp_path: Path) -> None:
    path, threads = tmp_path / "folder" / "bench.csv", torch.get_num_threads()
    config = BenchConfig(
        out=str(path), shapes=(TINY,), settings=("dense", "reference", "torch"),
        architectures=("topk", "jumprelu"), rounds=1, dead=3, threads=1,
    )  # fmt: skip
    bench(config)
    bench(config)
    assert torch.get_num_threads() == threads
    with path.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert tuple(found[0]) == rows.COLUMNS
    names = (*OPERATIONS, "topk", "jumprelu")
    assert [(r["name"], r["setting"]) for r in found] == 2 * [
        (name, setting) for name in names for setting in config.settings
    ]
    for row in found:
        assert [row[n] for n in ("batch", "d_in", "d_sae", "k")] == TINY.split("x")
        assert row["threads"] == "1"
        assert row["torch"] == torch.__version__
        assert row["library"] == (DENSE if row["setting"] == "dense" else OURS)
        assert float(row["median_s"]) >= float(row["least_s"]) > 0
        assert all(row[name] for name in ("date", "processor", "version", "saescope", "l0"))
        assert row["dead"] == "3"


def test_bench_prints_ratios_over_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shapes", TINY, "--what", "operations", "--operations", "decode"]
    code = main([*arguments, "--settings", "dense", "torch", "--rounds", "1"])
    said = capsys.readouterr().out
    assert code == 0
    assert "decode (operation) 64x16x96x4, L0 4.00, " not in said
    assert "decode (operation) 64x16x96x4, L0 4.00" in said
    assert "1.00x" in said


def test_an_architecture_without_a_dense_step_can_be_timed_without_one() -> None:
    config = {"shapes": (TINY,), "architectures": ("matryoshka",), "what": "steps", "rounds": 1}
    (row,) = bench(BenchConfig(settings=("torch",), **config))
    assert row["name"] == "matryoshka"
    with pytest.raises(InputError, match="has no dense step; leave dense out"):
        bench(BenchConfig(settings=("dense", "torch"), **config))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"shapes": ("8x8",)}, "shapes: not a shape"),
        ({"shapes": ("8x8x8x9",)}, "shape.k: out of range"),
        ({"shapes": ()}, "shapes: nothing to time"),
        ({"settings": ("quick",)}, "no such setting"),
        ({"baseline": "quick"}, "no such setting"),
        ({"operations": ("encode",)}, "operations: no such operation"),
        ({"rounds": 0}, "rounds: out of range"),
        ({"threads": 0}, "threads: out of range"),
        ({"dead": 96, "shapes": (TINY,)}, "dead: out of range"),
    ],
)
def test_what_bench_cannot_do_is_said(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        BenchConfig(**fields)


def test_a_wrong_shape_on_the_command_line_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--shapes", "12"])
    assert ended.value.code == 2
    assert "shapes: not a shape (given: '12'" in capsys.readouterr().err


# ---- all libraries in turn ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_steps_and_says_what_fails(tmp_path: Path) -> None:
    """The real driver with the one library that needs no other environment."""
    config = steps.StepsConfig(
        results=str(tmp_path / "steps.csv"), work=str(tmp_path), harvest=None, tiny=True, settle=2,
        scenarios=("small-relu-32", "mid-batchtopk-64"), libraries=(DENSE,), rounds=2, threads=1,
    )  # fmt: skip
    steps.measure(config)
    found = rows.read(tmp_path / "steps.csv")
    assert [(row["name"], row["setting"], row["rounds"]) for row in found] == [
        (kind, setting, "2") for kind in ("relu", "batchtopk") for setting in ("dense", "product")
    ]
    with Worker(DENSE, "dense", work=tmp_path, threads=1) as worker:
        with pytest.raises(ArtefactError, match="no dense step"):
            worker.load(tmp_path / "steps" / "inputs", "gated", 4)
        worker.process.kill()
        with pytest.raises(ArtefactError, match="has ended"):
            worker.step()


def test_a_library_that_computes_something_else_is_found_out() -> None:
    class Named:
        library, setting = "other", "default"

    same = {"squared_error": 1.0, "l0": 8.0}
    facts: dict[Any, Any] = {object(): same, object(): same, Named(): {**same, "l0": 9.0}}
    with pytest.raises(ArtefactError, match=r"other default: computes otherwise .* l0 differs"):
        steps._check_same(facts)


@pytest.mark.parametrize(
    "fields", [{"scenarios": ("tiny",)}, {"libraries": ("numpy",)}, {"rounds": 0}, {"threads": 0}]
)
def test_comparisons_that_there_are_not_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        steps.StepsConfig(**fields)


def test_weights_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"harvest": None, "steps": 3, "work": tmp_path}
    x, first = steps_data.settled(SHAPE, **options)
    monkeypatch.setattr(steps_data, "_train", None)
    again_x, again = steps_data.settled(SHAPE, **options)
    assert torch.equal(x, again_x)
    assert torch.equal(first.b_enc, again.b_enc)
    assert not torch.equal(first.W_dec, planted(SHAPE)[1].W_dec)
    with pytest.raises(TypeError):  # other settings are another training
        steps_data.settled(SHAPE, harvest=None, steps=4, work=tmp_path)


# ---- the page -----------------------------------------------------------------------------------


def step_row(library: str, setting: str, seconds: float, **more: object) -> dict[str, str]:
    row = dict.fromkeys(rows.COLUMNS, "1") | {
        "kind": "step", "name": "topk", "library": library, "setting": setting, "dead": "0",
        "data": "synthetic", "median_s": str(seconds), "batch": "2048", "d_in": "768",
        "d_sae": "8192", "k": "32", "threads": "2",
    }  # fmt: skip
    return row | {name: str(value) for name, value in more.items()}


FOUND = [
    step_row(OURS, "cpu", 0.1),
    step_row("SAELens", "default", 2.0),
    step_row("SAELens", "sparse", 1.0),
    step_row("dictionary_learning", "default", 1.5),
    step_row("sparsify", "signum", 0.4),
    step_row(OURS, "cpu", 0.2, dead=32),
    step_row("SAELens", "sparse", 1.8, dead=32),
    step_row("sparsify", "adam", 0.7, dead=32),
]


def test_a_target_holds_if_the_least_ratio_over_the_fastest_peer_does() -> None:
    found = {
        (target.what, target.over): (sorted(ratios.values()), holds)
        for target, ratios, holds in verdicts(comparisons(FOUND))
    }
    small = "TopK 2048x768x8192x32, exact"
    (faster, holds), (sparsify, holds_too) = (
        found[small, over] for over in ("the faster of SAELens and dictionary_learning", "sparsify")
    )
    assert faster == pytest.approx([9, 10])
    assert holds == "**no**"
    assert sparsify == pytest.approx([3.5, 4])
    assert holds_too == "yes"
    others = [value for key, value in found.items() if key[0] != small]
    assert all(each == ([], "not measured") for each in others)
    assert len(found) == len(TARGETS)


def test_a_screen_with_the_same_results_counts_as_exact() -> None:
    screened = step_row(OURS, "cpu+int8", 0.1, dead=32)
    text = page([*FOUND, screened], [])
    before = "| TopK 2048x768x8192x32, exact | sparsify | 3x | "
    assert f"{before}4.00 to 7.00 | yes | 3.50 to 4.00 |" in text


def test_a_later_row_replaces_an_earlier_one() -> None:
    later = step_row(OURS, "cpu", 0.15, dead=33)
    groups = comparisons([*FOUND, later])
    (group,) = [rows_ for title, rows_ in groups.items() if "33 dead" in title]
    assert [row["median_s"] for row in group] == ["0.15"]
    assert "0.2" not in {row["median_s"] for rows_ in groups.values() for row in rows_}


def test_the_page_says_what_falls_short() -> None:
    text = page(FOUND, [])
    assert "9.00x instead of 10x (topk, 2048x768x8192x32, synthetic, 32 dead features)" in text
    assert "sparsify: 3.50x" not in text
    assert "dense oneDNN: not measured" in text


def test_the_page_says_what_the_product_alone_would_reach() -> None:
    text = page([*FOUND, step_row(DENSE, "product", 0.15, dead=32)], [])
    assert "32 dead features; the encoder's product alone: 12.00x)" in text


def test_processors_without_avx512_have_a_section_and_targets_of_their_own() -> None:
    """A step of one thread is compared by its seconds of processor."""
    of_one = {"threads": 1, "instructions": "avx2; avx512f not used"}
    narrow = [
        step_row(OURS, "cpu+int16", 9.0, cpu_s=0.2, **of_one),
        step_row(OURS, "cpu", 9.0, cpu_s=0.3, **of_one),
        step_row(DENSE, "product", 0.1, cpu_s=0.18, **of_one),
        step_row(DENSE, "dense", 0.1, cpu_s=1.0, **of_one),
    ]
    wide = [row | {"instructions": "avx2 avx512f"} for row in FOUND]
    assert [is_narrow(row) for row in (narrow[0], wide[0])] == [True, False]
    text = page(wide, [], narrow=narrow)
    assert "## Processors without AVX-512" in text
    shape = "TopK 2048x768x8192x32, exact"
    assert f"| {shape} | 1.15 encoder products | 0.87x | 0.90 | yes | 0.60 |" in text
    assert f"| {shape} | dense torch | 6x | 5.00 | **no** | 3.33 |" in text
    assert "Processors without" not in page(wide, [])


def test_no_choice_of_a_run_was_slower_than_another_backend() -> None:
    """On every machine with rows of both; a tenth is what timing cannot tell."""
    found = rows.read(Path(__file__).parents[2] / "benchmarks" / "results" / "bench.csv")
    machines = {row["instructions"] for row in found if row["setting"] == "auto"}
    assert len(machines) >= 2
    for machine in machines:
        assert slower([row for row in found if row["instructions"] == machine], by=1.1) == []
    changed = [
        row | {"cpu_s": "9", "median_s": "9"} if row["setting"] == "auto" else row for row in found
    ]
    assert slower(changed, by=1.1)


def test_the_page_shows_what_a_run_chooses() -> None:
    of_one = {"kind": "operation", "name": "decode", "threads": 1, "instructions": "avx2"}
    found = [
        step_row(OURS, setting, 9.0, cpu_s=seconds, **of_one)
        for setting, seconds in (("torch", 0.02), ("cpu", 0.01), ("auto", 0.0105))
    ]
    text = "\n".join(section(found))
    assert "| operation | shape | torch | cpu | auto |" in text
    assert "| decode | 2048x768x8192x32 | 20.0 | 10.0 | 10.5 |" in text
    assert list(section(found[:2])) == []
    assert slower(found, by=1.1) == []
    assert slower(found, by=1.01) == ["decode 2048 768 8192 32"]


def test_screens_that_a_machine_lacks_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.kernels.screen.usable", lambda name: name == "int16")
    (found,) = steps.StepsConfig(
        scenarios=("small",), settings=("cpu", "cpu+int8", "cpu+int16")
    ).chosen()
    assert found.who == ((OURS, "cpu"), (OURS, "cpu+int16"))


@pytest.mark.skipif(not cpp_backend.usable(), reason="no compiler here")
def test_auto_is_what_a_run_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a step and for its operations."""
    chosen = {"decode": "torch"}
    monkeypatch.setattr(fastest, "backends", lambda shape: chosen)
    given = inputs()
    stepper = make_stepper(Setting("auto"), given, "topk", SHAPE.k)
    assert stepper.trainer.numerics.operations == chosen  # type: ignore[attr-defined]
    seen: list[bool] = []
    monkeypatch.setattr(cpp_backend, "decode", lambda *_: seen.append(by_torch("decode")))
    problem = make_problem(given, SHAPE.k)
    for name in ("auto", "cpu"):
        make_operation("decode", Setting(name), problem)()
    assert seen == [True, False]


def test_rows_name_the_instructions_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has more than torch and the C++ may use, only those, and that it has."""
    monkeypatch.setattr(rows, "_flags", lambda: ["sse", "avx2", "avx512f", "avx512_vnni"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert rows.instructions() == "avx2 avx512f avx512_vnni"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert rows.instructions() == "avx2; avx512f avx512_vnni not used"
    monkeypatch.setattr(rows, "_flags", lambda: ["sse", "avx2"])
    assert rows.instructions() == "avx2"
