"""The explorer's entry: `dashboards.server` runs it with Streamlit for every turn of a reader."""

from pathlib import Path

import streamlit as st

from dashboards.failures import show
from dashboards.pages import streamlit_pages, way_to_first
from dashboards.tokens import STYLE
from saescope.errors import SaescopeError

# a file of ours: the browser would fetch an icon that is only named from a server of others
ICON = Path(__file__).parent / "icon.svg"
st.set_page_config(page_title="saescope", page_icon=ICON, layout="wide")
try:
    page = st.navigation([*streamlit_pages().values(), way_to_first()], position="top")
    st.html(STYLE)
    page.run()
except SaescopeError as error:
    show(error)
