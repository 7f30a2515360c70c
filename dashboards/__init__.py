"""The feature explorer: a Streamlit application over feature stores."""
