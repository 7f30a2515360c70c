"""At which layers the feature of an SAE of several fires, or a crosscoder's writes."""

import streamlit as st

from dashboards import fact_figures, figures
from dashboards.amounts import amount
from dashboards.pages import Panel
from dashboards.queries import FeatureData
from dashboards.session import Session

PANEL = Panel(
    title="Layers",
    order=22,
    applies=lambda data: data.facts is not None and bool(data.facts.layer_shares),
    help="P(layer | feature): the share of the feature's activation at each layer that the SAE was "
    "trained on (Lawson et al. 2024), or for a crosscoder the share of its decoder norm.",
)


def panel(session: Session, data: FeatureData) -> None:
    """Draw the panel."""
    del session
    assert data.facts is not None
    layers, shares = data.facts.layers, data.facts.layer_shares
    st.plotly_chart(
        fact_figures.layer_profile(layers, shares),
        config=figures.CONFIG,
        key="layer_profile",
        alt="The feature's share at each layer",
    )
    mean, std = (data.feature.more.get(name) for name in ("layer_mean", "layer_std"))
    if layers[0].tokens and mean is not None and std is not None:
        at = sum(1 for each in shares if each.count)
        st.caption(
            f"It fires at {at} of {len(layers)} layers. Mean layer {amount(mean)} ± {amount(std)}, "
            f"counted from 0, on {layers[0].tokens:,} tokens."
        )
