"""Search of features by words or by meaning: its two fields, and what a meaning finds."""

import threading
from typing import TYPE_CHECKING

import streamlit as st

from dashboards.feature_view import SEARCHES
from store import Annotations, FeatureStore
from store.meaning import Meant, search_meaning

if TYPE_CHECKING:
    from activations.models.sentences import Sentences

_PLACEHOLDERS = {"words": "label, note, token or number", "meaning": "what a label or note means"}
_ABOUT = (
    "Words: the beginnings of words in labels and notes, top tokens, and numbers. Meaning: labels "
    "and notes of people and machines, by the cosine of their embeddings (MiniLM) to that of the "
    "text; features without either are not found."
)
NEAREST = 50
"""how many features are marked on the map, or drawn as points, for a meaning"""
# its tokenizer cannot be used by two threads at once
_LOCK = threading.Lock()


def fields(prefix: str) -> None:
    """Draw the fields: for the text, and for how it is looked for (`prefix`_q and `prefix`_by)."""
    way = st.session_state[f"{prefix}_by"]
    st.text_input(
        "Search",
        key=f"{prefix}_q",
        type="search",
        icon=":material/search:",
        max_chars=200,
        placeholder=_PLACEHOLDERS[way],
        width=270,
        persist_state="session",
    )
    st.segmented_control(
        "Search by",
        list(SEARCHES),
        format_func=SEARCHES.__getitem__,
        required=True,
        key=f"{prefix}_by",
        help=_ABOUT,
        persist_state="session",
    )


def ready(notes: Annotations) -> bool:
    """Whether meanings can be looked for; if not, the page says what to do."""
    with st.spinner("Looking for the model of sentences …"):
        from activations.models import sentences
    if not sentences.is_here():
        st.info(
            "Search by meaning needs the model of sentences MiniLM, which is not on this machine. "
            "This command brings it (80 MB):",
            icon=":material/download:",
        )
        st.code(sentences.how_to_get(), language=None, wrap_lines=True)
        return False
    if not notes.texts():
        st.info(
            "Meanings are looked for in labels and notes, and no feature has any yet: label some, "
            "or have a machine do it with `saescope label`.",
            icon=":material/label_off:",
        )
        return False
    return True


def by_meaning(store: FeatureStore, notes: Annotations, text: str) -> dict[int, Meant]:
    """All features with a label or note, by how near one is to a text in meaning, nearest first.

    Raises ArtefactError where the model's package is damaged.
    """
    from activations.models.sentences import MODEL_HASH

    model = _sentences()
    with _LOCK, st.spinner("Comparing meanings; labels that are new take a second a hundred …"):
        found = search_meaning(notes, text, model.embed, model=MODEL_HASH, limit=store.d_sae)
    return {each.feature: each for each in found if each.feature < store.d_sae}


@st.cache_resource(
    max_entries=1, show_spinner="Loading the model of sentences, once: some seconds …"
)
def _sentences() -> "Sentences":
    from activations.models import sentences

    return sentences.Sentences()
