"""Queries of whole documents: which there are, their tokens, and all features that fire in one."""

import numpy as np

from saescope.errors import InputError
from saescope.integers import as_index
from store.results import Active, Document, DocumentPage
from store.store_base import MOST
from store.token_queries import TokenQueries

_SPLITS = ("train", "held_out")


class DocumentQueries(TokenQueries):
    """Queries of documents."""

    def documents(self, text: str = "", limit: int = 50, offset: int = 0) -> DocumentPage:
        """One page of the documents that have a text in their title or key, in either case.

        Cost: a pass over the titles, some 20 ms for 100,000 documents.
        """
        if not isinstance(text, str):
            raise InputError("is no text", where="text", given=text)
        limit = as_index(limit, where="limit", low=0, high=MOST)
        offset = as_index(offset, where="offset", low=0, high=MOST)
        fits = "WHERE contains(lower(title), lower(?)) OR contains(lower(key), lower(?))"
        total = self._rows(f"SELECT count(*) FROM db.document {fits}", [text, text])[0][0]
        rows = self._rows(
            f"SELECT document, key, title FROM db.document {fits}"
            " ORDER BY document LIMIT ? OFFSET ?",
            [text, text, limit, offset],
        )
        return DocumentPage(rows, total)

    def document(self, document: int) -> Document:
        """A document's title, and its tokens with their positions in the store.

        Cost: a pass over the documents' numbers, under 1 ms a million tokens (after the first call,
        which reads the corpus into memory).
        Raises InputError if there is no such document.
        """
        number = as_index(document, where="document", low=-MOST, high=MOST)
        sql = "SELECT key, title, split FROM db.document WHERE document = ?"
        rows = self._rows(sql, [number])
        if not rows:
            raise InputError("no such document", where="document", given=number)
        key, title, split = rows[0]
        self._db.check_fits(split in (0, 1), "document")
        index = np.flatnonzero(self.corpus.document == number)
        ids = self.corpus.tokens[index]
        return Document(
            document=number,
            key=key,
            title=title,
            split=_SPLITS[split],
            position=self.corpus.positions(index),
            token_ids=ids,
            tokens=self.vocabulary.decode(ids.tolist()),
        )

    def features_of_document(self, document: int) -> Active:
        """All features active anywhere in a document, token by token, the strongest first.

        Cost: reads the rows of its positions: about 3 ms for 1,000 tokens.
        Raises InputError if there is no such document.
        """
        position = self.document(document).position
        if not len(position):
            return self._active(0, 0)
        breaks = np.flatnonzero(np.diff(position) > 1) + 1
        stretches = [
            self._active(int(stretch[0]), int(stretch[-1]) + 1)
            for stretch in np.split(position, breaks)
        ]
        names = ("position", "feature", "activation")
        return Active(*(np.concatenate([getattr(s, name) for s in stretches]) for name in names))
