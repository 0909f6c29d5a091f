"""An OpenAI-compatible endpoint as the teacher (vLLM, SGLang, a vendor), through the official client library.

A time-out, a broken connection, 408, 409, 429 and 5xx are tried again after a wait that doubles, with jitter; after a Retry-After no
request goes out before its time. What an endpoint does not know (a JSON schema, ``max_tokens``, a seed) is left out from then on.
The key comes from the environment; it is in no file and no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from instructrec_jax.config import TeacherConfig
from instructrec_jax.errors import ConfigError, UserError
from instructrec_jax.instructions.teacher.answers import schema
from instructrec_jax.instructions.teacher.budget import Budget, most
from instructrec_jax.instructions.teacher.cache import Cache, Reply, Usage
from instructrec_jax.instructions.teacher.questions import Request, form

_AGAIN = (408, 409, 429)  # and 5xx
_LONGEST_WAIT = 60.0  # seconds of back-off
_LONGEST_RETRY_AFTER = 900.0  # seconds; an endpoint that asks for more is left for now
_HOPELESS = 20  # requests in a row without an answer
# Errors of the HTTP library under the client library, whose name has changed: no connection was made, so nothing was sent.
_UNSENT = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")
_NAME = re.compile(r"[A-Za-z_]\w*")
REMEDY = "see that the endpoint works (teacher.base_url), then run the command again: nothing that was answered is asked again"


class Stopped(Exception):  # noqa: N818 - the end of a budget is no error
    """No further request is sent; the message says why."""


class _Broken(Exception):  # noqa: N818
    """A reply that is no chat completion."""


class Endpoint:
    """Sends requests, a number of them at a time, and stores every answer.

    Raises:
        UserError: the client library is not installed.
        ConfigError: no model, no key, a key where its name belongs, or an address that is none.
    """

    def __init__(self, config: TeacherConfig, cache: Cache, budget: Budget, owner: Callable[[int], str]):
        self._config, self._cache, self._budget, self._owner = config, cache, budget, owner
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"teacher.backend = openai needs the openai package ({error})",
                remedy="pip install 'instructrec_jax[teacher]'",
            ) from error
        self._openai: Any = openai
        if not config.model:
            raise ConfigError("teacher.model is empty", remedy="name a model that the endpoint serves")
        if config.base_url and not config.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                "teacher.base_url does not begin with http:// or https://", remedy="e.g. http://localhost:8000/v1"
            )
        if "@" in config.base_url:
            raise ConfigError(
                "teacher.base_url holds a user name or password", remedy="give the key by the environment"
            )
        if not _NAME.fullmatch(config.api_key_env) or not config.api_key_env.isupper():
            raise ConfigError(
                "teacher.api_key_env is not the name of an environment variable",  # it may be the key itself
                remedy="e.g. OPENAI_API_KEY; the key itself stands in no file",
            )
        self._key = os.environ.get(config.api_key_env, "")
        if not self._key and not config.base_url:
            raise ConfigError(
                f"the environment variable {config.api_key_env} is not set",
                remedy=f"export {config.api_key_env}, or set teacher.base_url to a server that needs no key",
            )
        self.stopped = ""  # why no further requests were sent
        self._retried = self._failed = 0  # requests sent again, and given up
        self._last_error = ""
        self._silent = 0
        self._not_before = 0.0
        self._unknown: set[str] = set()  # parameters that the endpoint does not take
        self._random = random.Random()  # jitter: what is written does not depend on it

    def answer(self, requests: Iterable[Request], done: Callable[[], None]) -> None:
        """Answer every request that has no answer yet; ``done`` is called once for each, answered or given up.

        Raises:
            UserError: the endpoint refuses the key, the model or the request, or does not answer at all.
        """
        if not self.stopped:
            asyncio.run(self._all(requests, done))

    @property
    def trouble(self) -> str:
        """What went wrong on the way to answers; "" = nothing."""
        if not self._last_error:
            return ""
        where = self._config.base_url or "the endpoint"
        return f"{where}: {self._retried:,} requests sent again, {self._failed:,} given up; the last error: {self._last_error}"

    async def _all(self, requests: Iterable[Request], done: Callable[[], None]) -> None:
        self._room = asyncio.Condition()
        self._client = self._openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self._config.base_url or None,
            timeout=self._config.timeout,
            max_retries=0,  # ours are counted by the budget
        )
        waiting = iter(requests)

        async def worker() -> None:
            for request in waiting:
                if self.stopped:
                    return
                try:
                    await self._one(request)
                except Stopped as reason:  # what others have under way is paid for: they finish it
                    self.stopped = self.stopped or str(reason)
                    return
                done()

        tasks = [asyncio.create_task(worker()) for _ in range(max(1, self._config.concurrency))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

    async def _one(self, request: Request) -> None:
        attempt = 0
        while attempt <= self._config.retries:
            await self._wait()
            wanted = most(request.prompt, self._config.max_output_tokens)
            await self._room_for(wanted)
            charge = self._cache.begin(wanted)
            left_out = frozenset(self._unknown)  # while it is under way, another worker may learn more
            cost = wanted  # unless it is known better: a reply that broke off may have been paid for
            try:
                reply = await self._send(request, wanted)
                cost = reply.usage
                self._cache.put(request.key, reply, charge, self._owner(request.user))
                self._silent = 0
                return
            except self._openai.APIStatusError as error:
                cost = Usage()
                self._cache.release(charge)
                if self._takes_less(error, left_out):
                    continue
                await self._status(error, attempt)
            except (self._openai.APIError, json.JSONDecodeError, _Broken) as error:
                if type(error.__cause__).__name__ in _UNSENT:
                    cost = Usage()
                    self._cache.release(charge)
                await self._back_off(attempt, None, self._safe(error))
            finally:
                self._budget.end(wanted, cost)
                async with self._room:
                    self._room.notify_all()
            attempt += 1
        self._failed += 1

    async def _send(self, request: Request, wanted: Usage) -> Reply:
        config = self._config
        options: dict[str, Any] = {
            "max_tokens": config.max_output_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
        }
        if form(config) == "json":
            named = {"name": request.kind, "strict": True, "schema": schema(request.kind)}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
            if "json_schema" in self._unknown:
                options["response_format"] = {"type": "json_object"}
        if "max_tokens" in self._unknown:
            options["max_completion_tokens"] = options["max_tokens"]
        for name in self._unknown:
            options.pop(name, None)
        found = await self._client.chat.completions.create(
            model=config.model, messages=[{"role": "user", "content": request.prompt}], **options
        )
        choices = getattr(found, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise _Broken("the reply is no chat completion")
        used = getattr(found, "usage", None)
        counts = [
            n for name in ("prompt_tokens", "completion_tokens") if isinstance(n := getattr(used, name, None), int)
        ]
        usage = Usage(*counts) if len(counts) == 2 else wanted
        return Reply(choices[0].message.content or "", usage, choices[0].finish_reason == "length")

    def _takes_less(self, error: Any, left_out: frozenset[str]) -> bool:
        """Whether the endpoint refused a parameter, so that the request goes out again without it.

        Of workers that are refused for one parameter, the first notes it; the others' requests held it, too, and are no sign of another.
        """
        if error.status_code not in (400, 422):
            return False
        if left_out != self._unknown:
            return True
        for name in ("response_format", "max_tokens", "temperature", "seed"):
            if name in str(error) and name not in self._unknown:
                # First a plainer form of JSON, then none.
                first = name == "response_format" and "json_schema" not in self._unknown
                self._unknown.add("json_schema" if first else name)
                return True
        return False

    async def _status(self, error: Any, attempt: int) -> None:
        """What to do about a status that is not 200: wait, or give up."""
        status, text = error.status_code, self._safe(error)
        if status in _AGAIN or status >= 500:
            await self._back_off(attempt, _retry_after(error.response.headers), text)
            return
        remedy = {
            401: f"check the key in {self._config.api_key_env}",
            403: f"check what the key in {self._config.api_key_env} may do",
            404: "check teacher.base_url (it often ends in /v1) and teacher.model",
        }
        raise UserError(f"the endpoint refuses with status {status}: {text}", remedy=remedy.get(status, ""))

    async def _back_off(self, attempt: int, asked: float | None, why: str) -> None:
        self._silent += 1
        self._last_error = why
        if self._silent >= max(_HOPELESS, 2 * self._config.concurrency):
            raise UserError(f"no answer to the last {self._silent} requests. {self.trouble}", remedy=REMEDY)
        if attempt >= self._config.retries:
            return
        loop = asyncio.get_running_loop()
        if asked is not None:
            if asked > _LONGEST_RETRY_AFTER:
                raise Stopped(f"the endpoint asks to come back in {asked:.0f} s")
            self._retried += 1
            self._not_before = max(self._not_before, loop.time() + asked)  # for every worker
            return
        self._retried += 1
        wait = min(_LONGEST_WAIT, self._config.backoff * 2**attempt)
        await asyncio.sleep(wait * self._random.uniform(0.5, 1.0))

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._not_before - loop.time()) > 0:
            await asyncio.sleep(left + self._random.uniform(0, 0.1))  # not all in one moment

    async def _room_for(self, wanted: Usage) -> None:
        """Reserve room in the budget, waiting for requests under way to turn out smaller than they might.

        Raises:
            Stopped: nothing is under way, and it does not fit.
        """
        async with self._room:
            await self._room.wait_for(lambda: self._budget.fits(wanted) or not self._budget.under_way.total)
            if not self._budget.fits(wanted):
                raise Stopped(f"the budget is used up: {self._budget}, and the next request may take {wanted.total:,}")
            self._budget.begin(wanted)

    def _safe(self, error: Exception) -> str:
        """An error's text and its cause's, without the key, and not longer than a line or two."""
        text = " ".join(str(error).split()) or type(error).__name__
        if error.__cause__ is not None and (cause := " ".join(str(error.__cause__).split())):
            text = f"{text} ({cause})"  # "Connection error." says little
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: a number or a date)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None
