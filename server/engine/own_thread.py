"""A thread for work that must leave no OpenMP workers behind.

A thread that computes on CPU gets OpenMP workers and keeps them until it ends. libgomp counts the
workers of all threads, and as soon as there are more than cores, each of them goes to sleep almost
at once when it has nothing to do, instead of looking out for more. A step has some hundred
parallel loops, so waking takes as long as computing then: on two cores a step takes twice the time.

So nothing may compute on a thread that lives on beside the engine's. Source: libgomp's
`gomp_managed_threads` and `gomp_throttled_spin_count_var`.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_own_thread(work: Callable[[], Result]) -> Result:
    """Run something on a thread that ends with it; what it raises is raised here.

    An interrupt while it runs is raised here at once and leaves the thread to itself, which does
    not keep the process from ending.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised again by the caller
            done.set_exception(error)

    thread = threading.Thread(target=run, name="euryale-own", daemon=True)
    thread.start()
    result = done.result()
    thread.join()
    return result
