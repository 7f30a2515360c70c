"""Token ids to text: a window is decoded as a whole, as a token can be part of a character."""

from collections.abc import Mapping, Sequence


def join_partial(raw: Sequence[bytes]) -> list[str]:
    """One string a token, from each token's UTF-8 bytes.

    A character that several tokens make up is shown by the token that completes it, and those
    before it show "": only there a model can know it. A token that completes one character and
    begins another leaves both to the token after which the text is whole, as a model's own
    `token_strings` does. Bytes that make up no character are shown as \\xNN. Nothing is lost.

    >>> join_partial([b"a", bytes([0xC3]), bytes([0xA9, 0x62])])
    ['a', '', 'éb']
    >>> join_partial([bytes([0xA9]), b"x"])
    ['\\\\xa9', 'x']
    """
    whole = b"".join(raw)
    texts: list[str] = []
    at = end = 0
    for index, piece in enumerate(raw):
        end += len(piece)
        shown, here = "", at
        while here < end:
            size = _character_size(whole, here)
            shown += whole[here : here + size].decode("utf-8", "backslashreplace")
            here += size
        is_whole = here == end or index == len(raw) - 1
        texts.append(shown if is_whole else "")
        at = here if is_whole else at
    return texts


def _character_size(whole: bytes, at: int) -> int:
    """Bytes of the character that begins at `at`; 1 where there is none."""
    lead = whole[at]
    size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    try:
        whole[at : at + size].decode("utf-8")
    except UnicodeDecodeError:
        return 1
    return size


class Vocabulary:
    """Texts of token ids.

    >>> Vocabulary(["a", " b"], {}).decode([1, 0])
    [' b', 'a']
    """

    def __init__(self, texts: Sequence[str], partial: Mapping[int, bytes]) -> None:
        self._texts = texts
        self._partial = partial

    def __len__(self) -> int:
        return len(self._texts)

    def raw(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token."""
        return self._partial.get(token_id) or self._texts[token_id].encode()

    def text(self, token_id: int) -> str:
        """One token by itself."""
        if token_id in self._partial:
            return join_partial([self._partial[token_id]])[0]
        return self._texts[token_id]

    def whole_texts(self, token_ids: Sequence[int]) -> list[str] | None:
        """The tokens' texts if each is one by itself, whatever is before and after it; or None."""
        if self._partial.keys().isdisjoint(token_ids):
            return [self._texts[token_id] for token_id in token_ids]
        return None

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """One string a token of a window; runs of partial tokens are decoded together."""
        whole = self.whole_texts(token_ids)
        if whole is not None:
            return whole
        texts: list[str] = []
        run: list[bytes] = []
        for token_id in token_ids:
            if token_id in self._partial:
                run.append(self._partial[token_id])
                continue
            if run:
                texts += join_partial(run)
                run = []
            texts.append(self._texts[token_id])
        return texts + join_partial(run)
