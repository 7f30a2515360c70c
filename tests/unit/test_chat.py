"""Whose message each token of a conversation is of, and edits of what one role says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae as sae_package
from activations import ChatTokens, Model, chat_tokens, load_model
from sae.commands.steer import SteerConfig, steer_text
from sae.core.base import SparseAutoencoder
from sae.steering.positions import Role
from saescope.chat import messages_of
from saescope.errors import InputError

AFTER = "blocks.2.hook_resid_pre"
TURNS = [
    {"role": "system", "content": "A sparse code."},
    {"role": "user", "content": "The river rose, le café <eos>?\nIn 1912"},
    {"role": "assistant", "content": "The river rose"},
    {"role": "user", "content": "The river rose"},
]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] | trim }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
JOINED = (  # as Llama 2's: the system's words within the user's first turn, a BOS before each turn
    "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {% if loop.first and s %}"
    "<<SYS>>{{ s }}<</SYS>>{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <eos>{% endif %}{% endfor %}"
)


@pytest.fixture
def model(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", PLAIN)
    return tiny_model


def said(model: Model, chat: ChatTokens, number: int) -> str:
    """The text of one stretch of tokens of the same role, the first being 0."""
    runs: list[tuple[str | None, list[int]]] = []
    for token, role in zip(chat.ids, chat.role, strict=True):
        if not runs or runs[-1][0] != role:
            runs.append((role, []))
        runs[-1][1].append(token)
    return model.codec.decode([ids for role, ids in runs if role is not None][number])


@pytest.mark.parametrize("template", [PLAIN, JOINED], ids=["plain", "joined"])
def test_whose_each_token_is(model: Model, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    chat = chat_tokens(model, TURNS)
    assert chat.ids == model.tokenize(chat.text)
    assert chat.ids.count(model.bos_token_id or 0) == (1 if template == PLAIN else 2)
    assert chat.role[0] is None, "the BOS"
    for number, turn in enumerate(TURNS):
        # a token may reach beyond the message, over the space or bracket beside it
        assert turn["content"] in said(model, chat, number)
        assert len(said(model, chat, number)) <= len(turn["content"]) + 4
    found = list(dict.fromkeys(chat.role))
    assert set(found) == {None, "system", "user", "assistant"}


def test_what_a_template_does_not_show_as_it_is(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template in (
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
    ):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        with pytest.raises(InputError, match="chat: the chat template changes what is said"):
            chat_tokens(model, TURNS)
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="has no chat template"):
        chat_tokens(model, TURNS)
    strange: list[Any] = [[], [{"role": "user"}], [{"role": "user", "content": ["text"]}]]
    for messages in strange:
        with pytest.raises(InputError, match="wants messages with a text each"):
            chat_tokens(model, messages)
    with pytest.raises(InputError, match="known from a fast tokenizer"):
        chat_tokens(object(), TURNS)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_a_role_says_is_edited(
    model: Model, sae: SparseAutoencoder, role: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", short)
    chat = chat_tokens(model, TURNS)
    ids = torch.tensor([chat.ids])
    before = model.capture(ids, [AFTER])[AFTER]

    def changed(**arguments: Any) -> list[bool]:
        with sae_package.steer(model, sae, add={5: 20.0}, positions=role, **arguments):
            after = model.capture(ids, [AFTER])[AFTER]
        return (after != before).any(-1)[0].tolist()

    kept = model.keep_mask(ids)[0].tolist()
    wanted = [each == role and own for each, own in zip(chat.role, kept, strict=True)]
    assert changed(chat=chat) == changed(chat=TURNS) == wanted
    assert any(wanted)
    eos = [n for n, token in enumerate(chat.ids) if token == model.eos_token_id]
    assert "user" in {chat.role[n] for n in eos}, "one that the user wrote, and it is left alone"


@pytest.mark.parametrize("cache", [True, False])
def test_the_answer_is_the_assistants(model: Model, sae: SparseAutoencoder, cache: bool) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_at_eos": False, "use_cache": cache}
    begun = chat_tokens(model, TURNS[1:2])
    found = {}
    for positions in ("assistant", "generated", "user"):
        with sae_package.steer(model, sae, add={5: 200.0}, positions=positions, chat=begun):
            found[positions] = model.generate_ids(begun.ids, **options)
    assert found["assistant"] == found["generated"] != found["user"]
    ended = chat_tokens(model, TURNS[1:3], with_answer_begun=False)
    longer = torch.tensor([[*ended.ids, 7, 8]])
    before = model.capture(longer, [AFTER])[AFTER]
    with sae_package.steer(model, sae, add={5: 20.0}, positions="assistant", chat=ended):
        after = model.capture(longer, [AFTER])[AFTER]
    changed: Tensor = (after != before).any(-1)[0]
    assert changed.any()
    assert not changed[-2:].any()


def test_roles_of_another_text_are_refused(model: Model, sae: SparseAutoencoder) -> None:
    chat = chat_tokens(model, TURNS[:2])
    with sae_package.steer(model, sae, add={5: 20.0}, positions="user", chat=chat):
        model.logits(torch.tensor([chat.ids, chat.ids]))
        other = [*chat.ids[:-1], chat.ids[-1] - 1]
        with pytest.raises(InputError, match="text 1 of the batch"):
            model.logits(torch.tensor([chat.ids, other]))
    with pytest.raises(InputError, match="nobody says anything in this role"):
        with_role(model, sae, positions="assistant", chat=chat_of_user(model))
    with pytest.raises(InputError, match="is known from a conversation: give chat"):
        with_role(model, sae, positions="user")


def with_role(model: Model, sae: SparseAutoencoder, **arguments: Any) -> None:
    with sae_package.steer(model, sae, add={5: 20.0}, **arguments):
        pytest.fail("must not be entered")


def chat_of_user(model: Model) -> ChatTokens:
    return chat_tokens(model, TURNS[1:2], with_answer_begun=False)


@pytest.mark.slow
def test_the_command_steers_a_role(
    tiny_folder: Path, sae: SparseAutoencoder, tmp_path: Path, model: Model
) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(tmp_path / "model")
    sae.save(tmp_path / "sae")
    prompt = "system: A sparse code.\nuser: The river rose"
    config: dict[str, Any] = {
        "run": str(tmp_path / "sae"), "model": str(tmp_path / "model"), "prompt": prompt,
        "add": ("5=200",), "chat": True, "max_new_tokens": 8,
    }  # fmt: skip
    roles: tuple[Role, ...] = ("system", "user")
    found: dict[Role, str] = {
        role: steer_text(SteerConfig(**config, positions=role))["steered"] for role in roles
    }
    own = load_model(str(tmp_path / "model"))
    chat = chat_tokens(own, messages_of(prompt))
    for role, text in found.items():
        with sae_package.steer(own, sae, add={5: 200.0}, positions=role, chat=chat):
            assert own.generate(chat.ids, max_new_tokens=8) == text
    assert found["system"] != found["user"]
    assert "<user>\nThe river rose" in found["user"]
    with pytest.raises(InputError, match="give chat"):
        steer_text(SteerConfig(**{**config, "chat": False}, positions="user"))
