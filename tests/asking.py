"""Asking a store as a coroutine, for tests: the port itself (core/store.py) speaks by callbacks."""

from __future__ import annotations

import asyncio

from gateway_extproc.core.store import (
    Admission,
    Admitted,
    Answer,
    Denied,
    Settlement,
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
            spent = -1, -admission.tokens, -admission.cost
            store.settle(Settlement(admission.id, keys, answer.second, *spent, with_budgets(windows)))
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
