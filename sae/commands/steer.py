"""`saescope steer`: continue a prompt with and without an edit of features."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from activations.models.chat import chat_tokens
from sae.commands.dose import FACTORS, DoseRequest, dose_of, print_dose
from sae.commands.model_of import model_of
from sae.core.base import SparseAutoencoder
from sae.formats.load import load
from sae.indexing.ends import feature_and_sign
from sae.steering.steer import steer
from saescope.chat import messages_of
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say
from store import FeatureFilter, FeatureStore
from store.database import STORE_FILE


@dataclass(frozen=True, kw_only=True)
class SteerConfig(Config):
    """Continue a prompt, untouched and steered; edits are written FEATURE=NUMBER."""

    run: str
    """Folder of a trained run or of an SAE, in any known format, or hf://owner/repo/folder."""
    model: str | None = None
    """Model to steer, a folder or a name; the one the SAE was trained on if not given."""
    site: str | None = None
    """Site to steer at, if not the one the SAE was trained at; of several layers, which."""
    target_site: str | None = None
    """Where someone else's transcoder writes, if its files do not say."""
    prompt: str = "The weather today"
    """Text to continue."""
    chat: bool = False
    """The prompt is a conversation, each turn a line that begins with system:, user: or assistant:;
    the model's chat template writes it."""
    add: tuple[str, ...] = ()
    """Add a multiple of a feature's decoder direction, e.g. 123=8, or, with a store, of its largest
    activation, e.g. 123=2x (so in all that follow but factors)."""
    clamp: tuple[str, ...] = ()
    """Hold a feature's activation at a value, e.g. 123=20."""
    at_least: tuple[str, ...] = ()
    """Raise a feature's activation to a value where it is below, e.g. 123=5."""
    at_most: tuple[str, ...] = ()
    """Lower a feature's activation to a value where it is above, e.g. 123=5."""
    scale: tuple[str, ...] = ()
    """Multiply a feature's activation, e.g. 123=0.5."""
    ablate: tuple[int, ...] = ()
    """Features to switch off."""
    project: tuple[str, ...] = ()
    """Multiply what the activation has along a feature's direction, e.g. 123=0 to take it out."""
    cap: tuple[str, ...] = ()
    """Let the activation have at most so much along a feature's direction, e.g. 123=10."""
    only_active: bool = False
    """Edit each feature only where it is active."""
    when: tuple[str, ...] = ()
    """Edit only where another feature is above an activation, e.g. 45=0.5."""
    positions: Literal["kept", "prompt", "generated", "system", "user", "assistant", "all"] = "kept"
    """Which tokens: kept (all but the first and special tokens), of these the prompt's, the
    generated ones, or those of a role in a chat (generated ones are the assistant's), or all."""
    freeze_attention: bool = False
    """Attend as the model does without the edit, whatever is edited."""
    allow_other_model: bool = False
    """Steer with an SAE that was trained on another model (base and fine-tuned, say)."""
    store: str | None = None
    """The SAE's feature store: knows largest activations, and chooses a feature if no edit is
    given."""
    strength: float = 1.5
    """Strength for a chosen feature, in units of its largest activation."""
    dose: int | None = None
    """Measure the dose-response of this feature of the store instead: effects and collateral at
    several strengths, on held-out text, beside random directions and an untrained SAE's features.
    Continuations are drawn at temperature 1 unless another is given."""
    doses: tuple[float, ...] = FACTORS
    """Strengths of --dose, in units of the feature's largest activation."""
    texts: int = 8
    """Held-out texts of the store for --dose."""
    out: str | None = None
    """File for --dose: its table as .csv, or all of it as .json."""
    max_new_tokens: int = 40
    """Tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    """Seed of the sampling, where temperature is above 0."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, low=1)
        check_range("temperature", self.temperature, low=0)
        check_range("texts", self.texts, low=1)
        if not self.doses or 0.0 in self.doses or len(set(self.doses)) < len(self.doses):
            raise InputError(
                "wants different numbers other than 0", where="doses", given=self.doses
            )


def parse_edits(name: str, words: tuple[str, ...]) -> dict[int, float | str]:
    """Edits from FEATURE=NUMBER or FEATURE=NUMBERx words; InputError for anything else.

    >>> parse_edits("add", ("123=8", "7=-0.5x"))
    {123: 8.0, 7: '-0.5x'}
    """
    edits: dict[int, float | str] = {}
    for word in words:
        feature, equals, number = word.partition("=")
        try:
            if not equals:
                raise ValueError
            key, value = int(feature), float(number.removesuffix("x"))
        except ValueError:
            raise InputError(
                "not an edit", where=name, given=word, allowed="FEATURE=NUMBER, FEATURE=NUMBERx"
            ) from None
        if key in edits:
            raise InputError("feature given twice", where=name, given=key)
        edits[key] = number if number.endswith("x") else value
    return edits


_EDITS = ("add", "clamp", "scale", "at_least", "at_most", "project", "cap")
_WANTED = ((3e-3, 1e-2, True), (1e-3, 1e-2, True), (1e-3, 3e-2, False))
"""of a feature to suggest, from the best: bounds of its density, and whether it must be a name's"""


def suggest(store_path: str) -> tuple[int, float, str]:
    """A feature that is plainly about one word, for a first try: its number, maximum, the word.

    Its strongest examples are all the same word, best a capitalised one of six letters or more (a
    name is easily recognised in a continuation); of several that are as good, the one that fires
    most strongly. Raises InputError if the store has none such.
    """
    with FeatureStore.open(_store_file(store_path)) as features:
        for low, high, must_be_name in _WANTED:
            wanted = FeatureFilter(density_min=low, density_max=high)
            page = features.features(wanted, sort="max", descending=True, limit=features.d_sae)
            numbers, maxima = page.rows["feature"].to_pylist(), page.rows["max"].to_pylist()
            tokens = features.top_tokens(numbers)
            for number, largest in zip(numbers, maxima, strict=True):
                word, *others = {token.strip() for token in tokens[number]} or {""}
                long = len(word) >= 6 if must_be_name else len(word) >= 4
                if not others and long and word.isalpha() and (word.istitle() or not must_be_name):
                    return number, largest, word
    raise InputError("no feature to suggest; give --add FEATURE=STRENGTH", where=store_path)


def steer_text(config: SteerConfig) -> dict[str, str]:
    """Print and return both continuations.

    Raises InputError for wrong edits or an SAE that does not fit its model.
    """
    sae = load(config.run, target_site=config.target_site)
    if config.dose is not None:
        return _dose(config, sae, config.dose)
    edits: dict[str, Any] = {name: parse_edits(name, getattr(config, name)) for name in _EDITS}
    edits["ablate"] = config.ablate
    when = {key: _level(value) for key, value in parse_edits("when", config.when).items()}
    if not any(edits.values()):
        if config.store is None:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in (*edits, "store"))
            raise InputError("nothing to do", where="steer", allowed=flags)
        edits["add"] = _suggested(config.store, config.strength, sae)
    model = model_of(
        sae, config.model, where=config.run, trust_remote_code=config.trust_remote_code
    )
    chat = chat_tokens(model, messages_of(config.prompt)) if config.chat else None

    def generate() -> str:
        return model.generate(
            config.prompt if chat is None else chat.ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )

    plain = generate()
    with (
        _opened(config.store) as store,
        steer(
            model,
            sae,
            **edits,
            only_active=config.only_active,
            when=when,
            positions=config.positions,
            site=config.site,
            chat=chat,
            store=store,
            freeze_attention=config.freeze_attention,
            allow_other_model=config.allow_other_model,
        ),
    ):
        steered = generate()
    say(f"untouched: {plain}", lines=True)
    say(f"steered ({_described(config, edits, when)}): {steered}", lines=True)
    return {"untouched": plain, "steered": steered}


def _suggested(store: str, strength: float, sae: SparseAutoencoder) -> dict[int, float]:
    """What is added of a feature that the store suggests."""
    feature, largest, word = suggest(store)
    feature, sign = feature_and_sign(feature, sae.d_sae if sae.signed else None)
    say(f"feature {feature} fires on {word!r}, with at most {largest:.1f}")
    return {feature: sign * round(strength * largest, 1)}


def _dose(config: SteerConfig, sae: SparseAutoencoder, feature: int) -> dict[str, str]:
    if config.store is None:
        raise InputError("needs the SAE's feature store: give --store", where="dose")
    given = [name for name in (*_EDITS, "ablate", "when") if getattr(config, name)]
    if given:
        raise InputError("goes with no other edit", where="dose", given=given)
    if config.out is not None and not config.out.endswith((".csv", ".json")):
        raise InputError("is no such file", where="out", given=config.out, allowed=".csv, .json")
    asked = DoseRequest(
        feature=feature,
        factors=config.doses,
        texts=config.texts,
        new_tokens=config.max_new_tokens,
        temperature=config.temperature or 1.0,
        seed=config.seed,
    )
    model = model_of(
        sae, config.model, where=config.run, trust_remote_code=config.trust_remote_code
    )
    with FeatureStore.open(_store_file(config.store)) as store:
        found = dose_of(
            model, sae, store, asked, site=config.site, allow_other_model=config.allow_other_model
        )
    return print_dose(found, config.doses, config.out)


def _described(config: SteerConfig, edits: dict[str, Any], when: dict[int, float]) -> str:
    """What was edited and where, in words."""
    conditions = {"where active": config.only_active, "where": when, "at": _where(config)}
    conditions["with attention frozen"] = config.freeze_attention
    described = {**edits, "ablate": list(config.ablate), **conditions}
    return ", ".join(
        name if value is True else f"{name.replace('_', ' ')} {value}"
        for name, value in described.items()
        if value
    )


def _where(config: SteerConfig) -> str | None:
    if config.positions in ("system", "user", "assistant"):
        return f"the {config.positions}'s tokens"
    return None if config.positions == "kept" else f"{config.positions} tokens"


def _level(value: float | str) -> float:
    if isinstance(value, str):
        raise InputError("not a number", where="when", given=value, allowed="FEATURE=NUMBER")
    return value


def _opened(store: str | None) -> AbstractContextManager[FeatureStore | None]:
    return nullcontext() if store is None else FeatureStore.open(_store_file(store))


def _store_file(store: str) -> Path:
    path = Path(store)
    return path / STORE_FILE if path.is_dir() else path
