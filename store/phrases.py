"""Finding a text in the corpus however it was cut into tokens, in one pass over the token ids."""

from collections.abc import Sequence

import numpy as np

from store.vocabulary import Vocabulary


class PhraseFinder:
    """Finds where the tokens in a row are, letter for letter, a given text.

    Upper and lower case count as the same with `ignore_case`.
    """

    def __init__(self, vocabulary: Vocabulary, *, ignore_case: bool = False) -> None:
        self._ignore_case = ignore_case
        self._ids: dict[bytes, list[int]] = {}
        for token_id in range(len(vocabulary)):
            raw = vocabulary.raw(token_id)
            if ignore_case:
                raw = _folded(raw)
            if raw:
                self._ids.setdefault(raw, []).append(token_id)
        self._longest = max(map(len, self._ids), default=0)
        self._n_tokens = len(vocabulary)

    def _text(self, text: str) -> bytes:
        return (text.casefold() if self._ignore_case else text).encode()

    def find(
        self, text: str, tokens: np.ndarray, joined: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The index of the last token [n] and the number of tokens [n] of each occurrence.

        tokens [n_tokens]; joined [n_tokens] says whether a token goes on the text of the one before
        it. An occurrence consists of whole tokens: "is" is not found in a token " this".
        """
        wanted = self._text(text)
        ends: list[tuple[np.ndarray, np.ndarray]] = []
        beginnings = [t for stop in self._stops(wanted, 0) for t in self._ids[wanted[:stop]]]
        index = indices_of(tokens, beginnings, self._n_tokens)
        # offset into the text -> (index of the token to look at, number of tokens before it)
        states = {0: [(index, np.zeros(len(index), dtype=np.int64))]}
        for offset in range(len(wanted)):
            if offset not in states:
                continue
            looked_at, so_far = map(np.concatenate, zip(*states.pop(offset), strict=True))
            for stop in self._stops(wanted, offset):
                here = np.isin(tokens[looked_at], self._ids[wanted[offset:stop]])
                index, before = looked_at[here], so_far[here]
                if stop == len(wanted):
                    ends.append((index, before + 1))
                    continue
                goes_on = index + 1 < len(tokens)
                goes_on[goes_on] = joined[index[goes_on] + 1]
                if goes_on.any():
                    states.setdefault(stop, []).append((index[goes_on] + 1, before[goes_on] + 1))
        if not ends:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        index, length = map(np.concatenate, zip(*ends, strict=True))
        order = np.argsort(index, kind="stable")
        return index[order], length[order]

    def beginning(self, text: str) -> list[int]:
        """The ids of the tokens that begin with a text."""
        wanted = self._text(text)
        return sorted(t for raw, ids in self._ids.items() if raw.startswith(wanted) for t in ids)

    def _stops(self, wanted: bytes, offset: int) -> list[int]:
        """Where a token may end that begins at an offset into a text."""
        most = min(offset + self._longest, len(wanted))
        return [n for n in range(offset + 1, most + 1) if wanted[offset:n] in self._ids]


def indices_of(tokens: np.ndarray, ids: Sequence[int], n_tokens: int) -> np.ndarray:
    """Where tokens [n] have one of the ids."""
    if not ids:
        return np.zeros(0, dtype=np.int64)
    if len(ids) == 1:
        return np.flatnonzero(tokens == ids[0])
    wanted = np.zeros(n_tokens, dtype=bool)
    wanted[list(ids)] = True
    return np.flatnonzero(wanted[tokens])


def indices_in_row(tokens: np.ndarray, joined: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """The index of the last token of each place where the tokens are these ids, one by one."""
    index = np.flatnonzero(tokens == ids[0])
    for token_id in ids[1:]:
        index = index[index + 1 < len(tokens)] + 1
        index = index[joined[index] & (tokens[index] == token_id)]
    return index


def _folded(raw: bytes) -> bytes:
    try:
        return raw.decode().casefold().encode()
    except UnicodeDecodeError:
        return raw
