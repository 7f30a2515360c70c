"""Token ids to text: a window is decoded as a whole, as a token can be part of a character."""

from collections.abc import Mapping, Sequence


def join_partial(raw: Sequence[bytes]) -> list[str]:
    """One string a token, from each token's UTF-8 bytes.

    A character that several tokens make up is given to the first of them, and the others get "";
    bytes that make up no character are shown as \\xNN. Nothing is lost.

    >>> join_partial([b"a", bytes([0xC3]), bytes([0xA9, 0x62])])
    ['a', 'é', 'b']
    >>> join_partial([bytes([0xA9]), b"x"])
    ['\\\\xa9', 'x']
    """
    whole = b"".join(raw)
    owner = [index for index, piece in enumerate(raw) for _ in piece]
    texts = [""] * len(raw)
    at = 0
    while at < len(whole):
        size = _character_size(whole, at)
        piece = whole[at : at + size]
        texts[owner[at]] += piece.decode("utf-8", "backslashreplace")
        at += size
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

    def text(self, token_id: int) -> str:
        """One token by itself."""
        if token_id in self._partial:
            return join_partial([self._partial[token_id]])[0]
        return self._texts[token_id]

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """One string a token of a window; runs of partial tokens are decoded together."""
        texts: list[str] = []
        run: list[bytes] = []
        for token_id in token_ids:
            if token_id in self._partial:
                run.append(self._partial[token_id])
                continue
            texts += join_partial(run)
            run = []
            texts.append(self._texts[token_id])
        return texts + join_partial(run)
