"""A conversation written as text: each turn begins with its speaker and a colon."""

import re

from saescope.errors import InputError

ROLES = ("system", "user", "assistant")
_TURN = re.compile(rf"^({'|'.join(ROLES)}):[ \t]*", re.MULTILINE)


def messages_of(text: str) -> list[dict[str, str]]:
    """The turns of a conversation; without any speaker, all of it is the user's.

    Raises InputError for text before the first speaker, or a turn without text.

    >>> messages_of("system: Be brief.\\nuser: Who\\nare you?")
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who\\nare you?'}]
    >>> messages_of("Who are you?")
    [{'role': 'user', 'content': 'Who are you?'}]
    """
    before, *parts = _TURN.split(text)
    if not parts:
        return [{"role": "user", "content": text.strip()}]
    if before.strip():
        allowed = ", ".join(f"{role}:" for role in ROLES)
        raise InputError("no speaker", where="chat", given=before.strip()[:40], allowed=allowed)
    turns = [
        {"role": role, "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    for turn in turns:
        if not turn["content"]:
            raise InputError("a turn without text", where="chat", given=f"{turn['role']}:")
    return turns
