"""Asking a store as a coroutine, for tests: the port itself (core/store.py) speaks by callbacks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from gateway_extproc.core.account import given_back
from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Answer,
    Denied,
    Store,
    StoreUnavailable,
    chosen,
    with_budgets,
    with_leases,
)


async def admit(store: Store, admission: Admission) -> Admitted | Denied:
    """The store's answer. Raises StoreUnavailable. Whoever is cancelled is charged nothing."""
    told: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def tell(answer: Answer) -> None:
        if told.cancelled():  # its awaiter goes only at the next turn of the loop
            give_back(answer)
        else:
            told.set_result(answer)

    def give_back(answer: Answer) -> None:
        if isinstance(answer, Admitted):
            keys, windows = tuple(window.key for window in admission.windows), admission.windows
            back = given_back(
                admission.id, keys, answer.second, admission.tokens, admission.cost, with_budgets(windows),
                admission.shares,
            )  # fmt: skip
            if back is not None:
                store.settle(back)
            store.release(admission.id, chosen(keys, with_leases(windows)))

    question = store.ask(admission, tell)
    try:
        answer = await told
    except asyncio.CancelledError:
        if not told.cancelled():
            give_back(told.result())
        elif question is not None:
            question.withdraw()
        raise
    if isinstance(answer, StoreUnavailable):
        raise answer
    return answer


async def until(condition: Callable[[], bool | Awaitable[bool]], deadline: float) -> None:
    """Wait for a state, for so many seconds at most."""
    ends = time.monotonic() + deadline
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < ends, "what was waited for did not come"
        await asyncio.sleep(0.01)
