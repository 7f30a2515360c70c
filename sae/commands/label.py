"""`saescope label`: labels from the store alone, by a model at an address, or by one run here."""

import threading
from collections.abc import Callable
from typing import Any

from saescope.errors import InputError
from saescope.system import system_errors
from store.labels.command import LabelConfig, label_store
from store.labels.endpoint import LOCAL, Answer

__all__ = ["LabelConfig", "label"]


@system_errors()
def label(config: LabelConfig) -> None:
    """Label a store's features; with --url local:SPEC by a language model that is run here.

    Raises InputError for a wrong choice of features or a model without a chat template,
    ArtefactError where labels cannot be saved. What is done when it is interrupted is kept, and the
    same command goes on.
    """
    label_store(config, _answers_of(config.url) if _runs_here(config) else None)


def _runs_here(config: LabelConfig) -> bool:
    return config.url is not None and config.url.startswith(LOCAL) and not config.dry_run


def _answers_of(url: str | None) -> tuple[Answer, str]:
    """The answers of the model that local:SPEC names, and the hash of its weights."""
    from activations.models.load import load_model

    model = load_model((url or "").removeprefix(LOCAL))
    return local_answers(model), model.weights_hash


def local_answers(model: Any) -> Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]:
    """What a language model answers to requests as `store.labels.endpoint` sends them.

    model: one of `activations`, whose tokenizer has a chat template. Its answers are the likeliest
    ones, token by token, one request at a time; the usage counts its tokens.

    Raises InputError, in an answer, for a request that is longer than the model's context.
    """
    turn = threading.Lock()

    def answer(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if request["temperature"]:
            raise InputError("a model here answers at 0", where="temperature")
        prompt = model.codec.render_chat(request["messages"], with_answer_begun=True)
        with turn:
            ids = model.tokenize(prompt)
            new = list(model.stream_ids(ids, max_new_tokens=request["max_tokens"]))
        text = "".join(model.token_strings(new)) if new else ""
        return text.strip(), {"prompt_tokens": len(ids), "completion_tokens": len(new)}

    return answer
