"""Asking a chat model: behind any OpenAI-compatible endpoint, or loaded by transformers.

An answer that did not end by itself (too long, filtered) is "": half an answer can say the opposite
of the whole. What an answer has to look like is for the asker to say; `strict_json` reads it to the
letter.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safelight.errors import BadInput, WorkFailed
from safelight.models import networks

AGAIN = {408, 429, 500, 502, 503, 504}  # answers after which asking again may help
FRAME = ("```json\n", "\n```")

Messages = Sequence[Mapping[str, Any]]  # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A chat model that a server answers for.

    Args:
        url: Up to and with its version, such as "http://localhost:8000/v1".
        model: Its name there.
        key: Environment variable that holds the endpoint's key; the key itself is never stored.
        timeout: Seconds to wait for one answer.
        tries: How often an endpoint that is busy or unreachable is asked.
        pause: Seconds before the second try; doubled for each that follows.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float | int = 60.0
    tries: int = 3
    pause: float | int = 1.0

    def ask(self, messages: Messages, **settings: Any) -> str:
        """The answer; "" if it did not end by itself.

        Args:
            messages: The talk so far.
            **settings: Of the request, such as `temperature`, `max_tokens`, `seed`.

        Raises:
            BadInput: The url is none.
            WorkFailed: There was no answer, or not one of this kind of endpoint.
        """
        body = {"model": self.model, **settings, "messages": list(messages)}
        said = self._post(json.dumps(body).encode())
        try:
            choice = json.loads(said)["choices"][0]
            text, end = choice["message"]["content"], choice["finish_reason"]
        except (ValueError, LookupError, TypeError) as error:
            raise WorkFailed(
                f"{self.url} did not answer as an OpenAI-compatible endpoint does "
                f"({type(error).__name__}: {error})"
            ) from error
        return text if isinstance(text, str) and end == "stop" else ""

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {secret}"
        address = self.url.rstrip("/") + "/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise BadInput(f"url={self.url}: an endpoint starts with http:// or https://.")
        request = urllib.request.Request(address, body, headers)
        why = "never asked"
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {error.reason}"
                if error.code not in AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, cut short
                why = str(getattr(error, "reason", "") or error or type(error).__name__)
        raise WorkFailed(f"no answer from {self.url} ({why})")


class Local:
    """A chat model of transformers that answers about text.

    Args:
        source: A folder or hub id with safetensors and a chat template.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = networks.folder(source)
        self.net: Any = networks.module(AutoModelForCausalLM, place)
        self.tokenizer: Any = networks.part(AutoTokenizer, place)
        if not self.tokenizer.chat_template:
            raise BadInput(f"{source} has no chat template; name a model that was made to chat.")
        if torch.cuda.is_available():
            self.net.to("cuda", torch.bfloat16)

    def ask(
        self, messages: Messages, *, temperature: float | int, max_tokens: int, seed: int
    ) -> str:
        """The answer; "" if it did not end by itself."""
        inputs = self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.net.device)
        warm = {"do_sample": True, "temperature": temperature} if temperature else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self.net.generate(**inputs, max_new_tokens=max_tokens, **warm)
        new = out[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True) if ended(self.net, new) else ""


def ended(net: Any, new: Any) -> bool:
    """Whether generated tokens end with the model's own end mark."""
    ends = net.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return len(new) > 0 and int(new[-1]) in ends


def strict_json(answer: str) -> Any:
    """An answer that is JSON and nothing else, in a code frame or without.

    Raises:
        ValueError: It is not, or an object has a key twice: the second could unsay the first.
    """
    text = answer.strip()
    if text.startswith(FRAME[0]) and text.endswith(FRAME[1]):  # a frame, not another form
        text = text[len(FRAME[0]) : -len(FRAME[1])]
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
