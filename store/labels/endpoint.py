"""A language model behind an OpenAI-compatible address: POST {url}/chat/completions.

Answers are kept on the disk under the hash of what was asked, so that nothing is paid for twice.
The key is sent to that address alone, and saved nowhere. Nothing is sent unless a user names an
address.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saescope.artefact import read_json, sha256_json, write_json
from saescope.errors import ArtefactError, InputError

Messages = Sequence[Mapping[str, str]]
Answer = Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]
"""from a request, as it is sent to an address, to the answer and how many tokens that took"""
LOCAL = "local:"
"""begins the address of a model that is run in this process"""
_LARGEST_ANSWER = 4 << 20
_TRIED_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the model is, and how it is asked."""

    url: str
    """as http://localhost:8080/v1; local:HASH is a model run here, with weights of this hash"""
    model: str
    key: str | None = field(default=None, repr=False)
    tries: int = 6
    timeout: float = 120.0
    """seconds to wait for an answer"""
    price_in: float = 0.0
    """of a million tokens asked"""
    price_out: float = 0.0
    """of a million tokens answered"""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://", LOCAL)):
            raise InputError(
                "is no address of a model",
                where="url",
                given=self.url,
                allowed=f"http(s)://... or {LOCAL}MODEL",
            )


@dataclass
class Usage:
    """What was asked of a model so far."""

    requests: int = 0
    cached: int = 0
    """answers that were on the disk"""
    tokens_in: int = 0
    tokens_out: int = 0

    def cost(self, endpoint: Endpoint) -> float:
        """In the currency of the endpoint's prices."""
        return (self.tokens_in * endpoint.price_in + self.tokens_out * endpoint.price_out) / 1e6


class Client:
    """Asks a model; safe to use from several threads.

    answer: of a model that is run here; without it, requests are sent to the endpoint's address.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: Path,
        *,
        answer: Answer | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint, self.usage = endpoint, Usage()
        self._answer = answer or self._over_the_network
        self._cache, self._sleep = cache, sleep
        self._lock = threading.Lock()

    def ask(self, messages: Messages, *, max_tokens: int) -> str:
        """The model's answer, at temperature 0; from the disk if the same was asked before.

        Raises InputError for a request or a key that the server refuses, ArtefactError if it cannot
        be reached or gives no answer in any of the tries.
        """
        request = {
            "model": self.endpoint.model,
            "messages": [dict(each) for each in messages],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        name = sha256_json([self.endpoint.url, request])
        path = self._cache / name[:2] / f"{name}.json"
        if path.is_file():
            found = read_json(path)
            if isinstance(found, dict) and isinstance(found.get("answer"), str):
                with self._lock:
                    self.usage.cached += 1
                return found["answer"]
        answer, usage = self._answer(request)
        write_json(path, {"request": request, "answer": answer, "usage": usage})
        with self._lock:
            self.usage.requests += 1
            self.usage.tokens_in += _count(usage.get("prompt_tokens"))
            self.usage.tokens_out += _count(usage.get("completion_tokens"))
        return answer

    def _over_the_network(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        where, reason = self.endpoint.url, ""
        for attempt in range(self.endpoint.tries):
            wait = min(2.0**attempt, _LONGEST_WAIT)
            try:
                return self._send(request)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode("utf-8", "replace")
                reason = f"HTTP {error.code}: {' '.join(said.split())[:300]}"
                if error.code not in _TRIED_AGAIN:
                    raise InputError(f"the server refuses: {reason}", where=where) from None
                wait = _asked_wait(error.headers.get("Retry-After"), wait)
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt + 1 < self.endpoint.tries:
                self._sleep(wait)
        raise ArtefactError(
            f"no answer in {self.endpoint.tries} tries; what is done is kept, and the same command"
            f" goes on ({reason})",
            where=where,
        )

    def _send(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        asked = urllib.request.Request(
            f"{self.endpoint.url.rstrip('/')}/chat/completions",
            data=json.dumps(request).encode(),
            headers=headers,
        )
        with urllib.request.urlopen(asked, timeout=self.endpoint.timeout) as stream:
            found = json.loads(stream.read(_LARGEST_ANSWER))
        answer = found["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise ValueError("its answer is no text")
        usage = found.get("usage")
        return answer, usage if isinstance(usage, dict) else {}


def _asked_wait(given: str | None, otherwise: float) -> float:
    """The seconds that a server asks to wait; `otherwise` if it does not say."""
    try:
        return min(max(float(given or ""), 0.0), _LONGEST_WAIT)
    except ValueError:
        return otherwise


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has: one for four characters.

    >>> estimated_tokens("a" * 10)
    3
    """
    return -(-len(text) // 4)
