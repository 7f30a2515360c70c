"""The explorer's entry: `saescope explore` runs it with Streamlit."""

from pathlib import Path

import streamlit as st

from dashboards import session
from dashboards.tokens import STYLE, plain
from saescope.errors import SaescopeError

# a file of ours: the browser would fetch an icon that is only named from a server of others
ICON = Path(__file__).parent / "icon.svg"
st.set_page_config(page_title="saescope", page_icon=ICON, layout="wide")
pages = [
    st.Page(session.OVERVIEW, title="Overview", icon=":material/dashboard:", default=True),
    st.Page(session.FEATURES, title="Features", icon=":material/table_rows:", url_path="features"),
    st.Page(session.FEATURE, title="Feature", icon=":material/search:", url_path="feature"),
    st.Page(session.TEXT, title="Try your text", icon=":material/edit_note:", url_path="text"),
]
page = st.navigation(pages, position="top")
st.html(STYLE)
try:
    page.run()
except SaescopeError as error:
    st.error(plain(error), icon=":material/error:")
