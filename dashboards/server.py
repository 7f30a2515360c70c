"""The explorer's server: its pages, and what is shown when one of them fails.

`saescope explore` runs it with Streamlit.
"""

from pathlib import Path

import streamlit as st

from dashboards.failures import show

# errors come here also from what pages call when a reader presses or types something
app = st.App(Path(__file__).parent / "app.py", on_script_error=show)
