"""Products of 16-bit numbers made in float32: as near to the truth, chosen once, kept for good."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from activations import CorpusConfig, HarvestConfig, Model, ModelConfig, harvest
from activations import load_model as load
from activations.models import matmul_precision
from activations.models.devices import resolve_dtype
from activations.models.matmul_precision import faster_products, multiplied_in
from sae.data.harvests import load_harvested_model
from tests.interrupt import Interrupt
from tests.tiny import make_tiny_corpus, make_tiny_model

CPU = torch.device("cpu")
SITE = "blocks.1.hook_resid_post"
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: linear(x, w, b),
    "without a bias": lambda x, w, _: linear(x, w),
    "by name": lambda x, w, b: linear(weight=w, input=x, bias=b),
    "three dimensions": lambda x, w, b: linear(x.view(4, 25, -1), w, b).flatten(0, 1),
    "GPT-2": lambda x, w, b: torch.addmm(b, x, w.T),
    "scaled": lambda x, w, b: torch.addmm(b, x, w.T, alpha=2.0),
}


def operands(dtype: torch.dtype, rows: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 300), (50, 300), (50,))
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_rounded_once(name: str, dtype: torch.dtype) -> None:
    given = operands(dtype)
    truth = PRODUCTS[name](*(x.double() for x in given))
    with multiplied_in("float32"):
        found = PRODUCTS[name](*given)
    assert found.dtype == dtype
    # half a step of the precision, and what adding up in float32 costs
    step = torch.finfo(dtype).eps / 2
    assert bool(((found.double() - truth).abs() <= 1.01 * step * truth.abs() + 1e-4).all())


@pytest.mark.parametrize(
    "given", [operands(torch.float32), operands(torch.float64), operands(torch.bfloat16, rows=63)]
)
def test_what_is_left_alone(given: tuple[Tensor, ...]) -> None:
    with multiplied_in("float32"):
        found = linear(*given)
    assert torch.equal(found, linear(*given))
    with multiplied_in("own"):
        assert torch.equal(linear(*given), found)


@pytest.fixture
def unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of which nothing is known yet, and whose answers are forgotten."""
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    matmul_precision._products.cache_clear()
    matmul_precision._precision.cache_clear()


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize(("own", "other", "chosen"), [(1.0, 0.7, "float32"), (0.7, 1.0, "own")])
def test_the_faster_is_chosen_once(
    own: float, other: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later process, on a machine that is busy by then, chooses as the first did."""
    times = iter([own, other])
    monkeypatch.setattr(
        "activations.models.matmul_precision.seconds_of_product", lambda _: next(times)
    )
    assert faster_products(torch.bfloat16, CPU) == chosen
    assert list(times) == []
    forget()
    assert faster_products(torch.bfloat16, CPU) == chosen


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize(("short", "chosen"), [(0.5, "bfloat16"), (0.95, "float32")])
def test_the_faster_precision_is_chosen_once(
    short: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [short, 1.0]
    monkeypatch.setattr(
        "activations.models.matmul_precision.seconds_of_product", lambda _: times.pop(0)
    )
    assert resolve_dtype("auto", CPU) == chosen
    forget()
    assert resolve_dtype("auto", CPU) == chosen
    for path in (tmp_path / "cache").iterdir():
        path.write_text("neither")
    forget()
    with pytest.raises(IndexError):  # measured anew
        resolve_dtype("auto", CPU)


def test_nothing_is_measured_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("activations.models.matmul_precision.seconds_of_product")
    assert faster_products(torch.float32, CPU) == "own"
    assert faster_products(torch.bfloat16, torch.device("cuda")) == "own"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float32's as in its own products; and only `capture` multiplies otherwise."""
    folder = make_tiny_model(tmp_path / architecture, architecture)
    exact, model = load(str(folder), dtype="float32"), load(str(folder), dtype="bfloat16")
    tokens = torch.randint(5, 200, (8, 16), generator=torch.Generator().manual_seed(0))
    truth = exact.capture(tokens, [SITE])[SITE]
    turned = []
    worth_it = matmul_precision._worth_it
    monkeypatch.setattr(
        matmul_precision, "_worth_it", lambda x: turned.append(x.shape) or worth_it(x)
    )
    error = []
    for model.products in ("own", "float32"):
        assert turned == []
        found = model.capture(tokens, [SITE])[SITE].float()
        error.append(float((found - truth).norm() / truth.norm()))
    assert len(turned) >= 8
    assert error[1] < 1.2 * error[0] < 0.05
    count = len(turned)
    model.logits(tokens)
    assert len(turned) == count


def test_a_harvest_keeps_to_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HarvestConfig(
        model=ModelConfig(spec=str(make_tiny_model(tmp_path / "model")), dtype="bfloat16"),
        corpus=CorpusConfig(source=str(make_tiny_corpus(tmp_path))), sites=(SITE,), context=32,
        max_tokens=8192, out=str(tmp_path / "harvest"),
    )  # fmt: skip
    monkeypatch.setattr("activations.models.load.faster_products", lambda *_: "float32")
    with monkeypatch.context() as patch:
        Interrupt(patch, Model, "capture", 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    # as on a machine that is busy by now
    monkeypatch.setattr("activations.models.load.faster_products", lambda *_: "own")
    used = []
    monkeypatch.setattr(
        "activations.models.language.multiplied_in",
        lambda how: used.append(how) or multiplied_in(how),
    )
    store = harvest(config)
    assert store.manifest["model"]["products"] == "float32"
    assert set(used) == {"float32"}
    # what is measured with its model later is multiplied in the same way
    assert load_harvested_model(store, "bfloat16").products == "float32"
