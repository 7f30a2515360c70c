"""The features that fire most often, and the tokens at which they are strongest."""

import streamlit as st

from dashboards.pages import Page
from dashboards.session import begin_page, link
from dashboards.tokens import plain_visible
from store import FeatureFilter

PAGE = Page(title="Common features", icon=":material/trending_up:", order=25, url="common")
SHOWN = 20


def render() -> None:
    """Draw the page."""
    session = begin_page("Common features")
    page = session.store.features(
        FeatureFilter(state="live"), sort="density", descending=True, limit=SHOWN
    )
    numbers = page.rows["feature"].to_pylist()
    tokens = session.store.top_tokens(numbers)
    for number, density in zip(numbers, page.rows["density"].to_pylist(), strict=True):
        left, right = st.columns([1, 4])
        with left:
            link(session, number, f"{number}: {100 * density:.1f} %")
        right.markdown(" · ".join(map(plain_visible, tokens[number])))


if __name__ == "__main__":
    render()
