"""The feature explorer: a Streamlit application over feature stores."""

from saescope import __version__ as __version__  # which finds old names of modules, too
