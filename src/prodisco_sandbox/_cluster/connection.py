"""The connection that requests go through; it knows nothing of how one is opened."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from .._aio.single_flight import SingleFlight
from .._log import get_logger
from ..errors import SandboxUnavailableError
from .lenient import CustomObjects

OPEN_TIMEOUT = 30.0
"""Bound on loading the configuration, which may run a credential plugin."""


class Connection:
    """The API object that requests go to: one that was passed in, or one that is opened on first use.

    Attributes:
        renewals: How often the credentials have been renewed.
    """

    def __init__(
        self,
        given: Any | None,
        open_api: Callable[[], Awaitable[Any]] | None,
        events: Counter[str] | None = None,
    ) -> None:
        if given is None and open_api is None:
            # Now, before there are sessions to keep waiting: it takes half a second.
            from .credentials import open_custom_objects_api as open_api
        self._log = get_logger("kubernetes", events)
        self._given = None if given is None else CustomObjects(given)
        self._open_api = open_api
        self._open = SingleFlight("kubernetes-config", self._opened)
        self._renew = SingleFlight("kubernetes-credentials", self._renewed)
        self.renewals = 0

    async def api(self) -> CustomObjects:
        return await self._open() if self._given is None else self._given

    async def renew(self, since: int) -> bool:
        """After a 401: renews the credentials, unless that was done since the request (see `renewals`).

        Returns whether the request may succeed now. `SandboxUnavailableError`: they could not be loaded.
        """
        client = (await self.api()).client
        if not hasattr(client, "renew_credentials"):
            # It was passed in: its own hook is called for each request.
            configuration = getattr(client, "configuration", None)
            return getattr(configuration, "refresh_api_key_hook", None) is not None
        if since == self.renewals:
            self._renew.forget()
            await self._renew()
        return True

    async def aclose(self) -> None:
        """Ends what is under way, and closes a connection that was opened here."""
        await self._renew.aclose()
        opened = await self._open.aclose()
        if opened is not None and opened.client is not None:
            await opened.client.close()

    async def _opened(self) -> CustomObjects:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                assert self._open_api is not None  # noqa: S101
                return CustomObjects(await self._open_api())
        except TimeoutError as e:
            raise SandboxUnavailableError(
                f"the Kubernetes configuration has not been loaded within {OPEN_TIMEOUT:g} s"
            ) from e

    async def _renewed(self) -> None:
        client: Any = (await self.api()).client
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                await client.renew_credentials()
        except (SandboxUnavailableError, TimeoutError) as e:
            why = str(e) or f"not within {OPEN_TIMEOUT:g} s"
            self._log.warning("credentials_not_renewed", reason=why)
            text = f"the API server refused the credentials, and new ones could not be loaded: {why}"
            raise SandboxUnavailableError(text, status=401) from e.__cause__ or e
        self.renewals += 1
        self._log.info("credentials_renewed")
