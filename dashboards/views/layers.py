"""At which layers the features of a multi-layer SAE fire (MLSAE, Lawson et al. 2024)."""

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from dashboards import fact_figures, figures, find_stores, queries
from dashboards.amounts import amount, counted
from dashboards.clicks import clicked_point, clicked_row
from dashboards.pages import Page
from dashboards.session import Session, begin_page, open_feature
from saescope.paths import AnyPath
from store import FeatureStore
from store.fact_results import Layer

PAGE = Page(title="Layers", icon=":material/layers:", order=62, url="layers")

MOST_FEATURES = 2000
_HELD = 0.05  # share of a feature's activation that makes a layer one of its layers
_DAY = 86_400


def render() -> None:
    """Draw the page."""
    session = begin_page("Layers")
    if not session.store.has_facts:
        st.info(
            "An older saescope built this store and did not look at layers; `saescope index RUN "
            "--out FOLDER --replace` builds it anew, and labels stay.",
            icon=":material/layers:",
        )
    elif layers := session.store.layers():
        _of_several(session, layers)
    else:
        _of_one()
    _stores(session)


def _of_one() -> None:
    st.info(
        "This SAE is of one layer, or was not measured at its others (`saescope index "
        "--layer-tokens`). One that reads several layers shows here at which of them each feature "
        "fires.",
        icon=":material/layers:",
    )
    st.caption(
        "An SAE of several layers (MLSAE, Lawson et al. 2024) is trained on a harvest of several "
        'sites; a crosscoder (`sae.kind = "crosscoder"`, without mix_layers) reads them at once.'
    )
    st.code(
        'saescope harvest HARVEST.toml  # with sites = ["blocks.*.hook_resid_post"]\n'
        "saescope train TRAIN.toml --mix-layers all --normaliser standardised\n"
        "saescope index RUN --site blocks.9.hook_resid_post --out stores/NAME",
        language=None,
        wrap_lines=True,
    )


@st.cache_data(max_entries=16, ttl=_DAY, show_spinner=False)
def _shares(_store: FeatureStore, version: queries.Version) -> np.ndarray:
    return _store.layer_shares()


def _of_several(session: Session, layers: list[Layer]) -> None:
    shares = _shares(session.store, session.version)
    used = np.flatnonzero(shares.sum(0) > 0)
    measured = layers[0].tokens > 0
    if not len(used):
        st.info("No feature fires at any layer.", icon=":material/visibility_off:")
        return
    if measured:
        _figures(session, layers, len(used))
    else:
        st.caption(
            "A crosscoder fires once for all of its layers: shares here are of the norm of what a "
            "feature writes at each."
        )
    _heat_map(session, layers, shares, used)
    _charts(layers, shares[:, used], measured)


def _figures(session: Session, layers: list[Layer], used: int) -> None:
    """The figures that the paper reports, beside their null."""
    found = session.store.meta.get("layer_use")
    summary: dict[str, Any] = found if isinstance(found, dict) else {}
    variances, null = summary.get("variances") or {}, summary.get("null") or {}
    texts = (
        (
            "Layers on a token",
            summary.get("layers_per_pair"),
            "",
            "Mean number of layers at which a feature fires on a token on which it fires at all.",
        ),
        (
            "Spread over layers",
            summary.get("mean_std"),
            " layers",
            "Mean over features of the standard deviation of a feature's layer.",
        ),
        (
            "Variance ratio",
            variances.get("ratio"),
            "",
            "Variance of a feature's layer on one token over that on all tokens: near 0, a feature "
            "has one layer on a token, though which differs between tokens; near 1, a token tells "
            "nothing more.",
        ),
        (
            "… layers shuffled",
            null.get("ratio"),
            "",
            "The same with the layer labels of each token shuffled: what would be by chance.",
        ),
    )
    for column, (label, value, unit, text) in zip(st.columns(4), texts, strict=True):
        shown = f"{amount(value, 3)}{unit}" if isinstance(value, int | float) else "–"
        column.metric(label, shown, help=text, border=True)
    st.caption(
        f"{counted(used, 'feature')} of {session.store.d_sae:,} fire at any of "
        f"{counted(len(layers), 'layer')}, measured on {layers[0].tokens:,} training tokens."
    )


def _heat_map(session: Session, layers: list[Layer], shares: np.ndarray, used: np.ndarray) -> None:
    mean = np.arange(len(layers)) @ shares[:, used]
    order = used[np.argsort(mean, kind="stable")]
    if len(order) > MOST_FEATURES:
        order = order[np.linspace(0, len(order) - 1, MOST_FEATURES).astype(int)]
    st.markdown(
        "##### Features by layer",
        help="Each column is a feature, sorted by its mean layer; the colour is the share of its "
        "activation at each layer.",
    )
    column = clicked_point(
        fact_figures.layer_heat_map(
            shares[:, order], order, [each.site for each in layers], 260 + 9 * len(layers)
        ),
        "layers_heat_map",
        alt="Features, sorted by their mean layer, and the share of each at each layer",
    )
    some = f" {len(order):,} of {len(used):,} are drawn, evenly." if len(order) < len(used) else ""
    st.caption(f"Click a cell to open its feature, or a row below.{some}")
    if column is not None:
        open_feature(session, int(order[column]))
    _open_one(session, layers, shares, used)


def _open_one(session: Session, layers: list[Layer], shares: np.ndarray, used: np.ndarray) -> None:
    """The features that do most at a chosen layer, as a table; a click opens one."""
    names = fact_figures.layer_names([each.site for each in layers])
    layer = st.segmented_control(
        "Features with the largest share at layer",
        range(len(layers)),
        format_func=names.__getitem__,
        default=0,
        required=True,
        key=f"layers_of_{session.name}",
        persist_state="session",
    )
    at = int(layer or 0)
    best = used[np.lexsort((used, -shares[at, used]))][:50]
    called = queries.names(session.store, session.notes, best.tolist())
    frame = pd.DataFrame(
        {
            "feature": best,
            "label or top tokens": [called[number] for number in best.tolist()],
            **{name: 100 * shares[n, best] for n, name in enumerate(names)},
        }
    )
    percentages = {
        name: st.column_config.NumberColumn(name, format="%.1f %%", help=layers[n].site)
        for n, name in enumerate(names)
    }
    row = clicked_row(
        frame,
        f"layers_table_{at}",
        most=8,
        column_config={
            "feature": st.column_config.NumberColumn("feature", width=70, format="%d"),
            **percentages,
        },
    )
    if row is not None:
        open_feature(session, int(best[row]))


def _charts(layers: list[Layer], shares: np.ndarray, measured: bool) -> None:
    names = fact_figures.layer_names([each.site for each in layers])
    peak = np.bincount(shares.argmax(0), minlength=len(layers))
    held = (shares >= _HELD).sum(0)
    several = np.bincount(held, minlength=len(layers) + 1)[1:]
    columns = st.columns(3 if measured else 2, gap="large")
    with columns[0]:
        st.markdown("##### Where features do most")
        _chart(fact_figures.layer_bars(peak, names, "layer", "features"), "peak")
        st.caption("Features by the layer with their largest share.")
    with columns[1]:
        st.markdown("##### At how many layers")
        numbers = [str(n) for n in range(1, len(layers) + 1)]
        _chart(fact_figures.layer_bars(several, numbers, "layers", "features"), "several")
        many = figures.percent(float((held > 1).mean()))
        st.caption(
            f"Layers that have at least {100 * _HELD:.0f} % of a feature's activation: "
            f"more than one for {many} of the features."
        )
    if measured:
        with columns[2]:
            st.markdown("##### How alike the layers are")
            _chart(fact_figures.adjacent_layers(layers), "adjacent")
            st.caption(
                "Mean cosine of a token's activations at neighbouring layers, each less its mean."
            )


def _chart(figure: Any, name: str) -> None:
    st.plotly_chart(figure, config=figures.CONFIG, key=f"layers_{name}", alt=name)


def _stores(session: Session) -> None:
    """All stores of the same model, in the order of their sites."""
    stores = find_stores.stores()
    found = queries.same_model(session.name, stores)
    if len(found) < 2:
        return
    st.markdown("##### SAEs of the same model, by site")
    rows = [_store_row(name, stores[name]) for name in found]
    frame = pd.DataFrame(sorted(rows, key=lambda row: (row["layer"], row["site"], row["SAE"])))
    st.dataframe(
        frame,
        hide_index=True,
        height=35 * (min(len(frame), 12) + 1) + 3,
        column_config={
            "layer": st.column_config.NumberColumn("layer", width=70, format="%d"),
            "features": st.column_config.NumberColumn("features", format="localized"),
        },
    )
    st.caption("Choose another SAE above to see its layers.")


def _store_row(name: str, path: AnyPath) -> dict[str, Any]:
    store = queries.open_store(path)
    facts = queries.overview(store, queries.version_of(path))
    number = facts.site.removeprefix("blocks.").partition(".")[0]
    several = len(store.layers()) if store.has_facts else 0
    return {
        "layer": int(number) if number.isdigit() else -1,
        "site": facts.site,
        "SAE": name,
        "architecture": facts.architecture,
        "features": facts.d_sae,
        "live": facts.n_live,
        "active per token": f"{facts.mean_active:.1f}",
        "layers": str(several) if several else "1",
    }


if __name__ == "__main__":
    render()
