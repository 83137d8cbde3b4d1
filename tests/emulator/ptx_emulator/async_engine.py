"""When asynchronous operations happen.

eager: at once. lazy: only when a wait or nothing else forces them. random: at any time, in any
order that the hardware allows. starved: at once, but threads differ (`starvation`). What a kernel
computes must not depend on it.
"""

import random
from collections import deque
from collections.abc import Callable

MODES = ("eager", "lazy", "random", "starved")


class Operation:
    """Work that happens once, some time after it was issued."""

    __slots__ = ("action", "done")

    def __init__(self, action: Callable[[], None]):
        self.action: Callable[[], None] | None = action
        self.done = False

    def complete(self) -> None:
        if not self.done:
            self.done = True
            action, self.action = self.action, None
            action()


class AsyncEngine:
    def __init__(self, mode: str, seed: int):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}; one of {', '.join(MODES)}")
        self.mode = mode
        self.random = random.Random(seed)
        # How often ordered queues go before free operations: differs by seed, so that some runs
        # starve the copies and some the matrix pipe.
        self.ordered_first = (0.5, 0.95, 0.05)[seed % 3]
        self.free: list[Operation] = []
        self.queues: list[deque[Operation]] = []

    def new_queue(self) -> deque[Operation]:
        """A queue whose operations complete in the order of issue."""
        self.queues.append(deque())
        return self.queues[-1]

    def submit(self, action: Callable[[], None]) -> Operation:
        operation = Operation(action)
        if self.mode in ("eager", "starved"):
            operation.complete()
        else:
            self.free.append(operation)
        return operation

    def submit_in_order(self, queue: deque[Operation], action: Callable[[], None]) -> Operation:
        operation = Operation(action)
        if self.mode in ("eager", "starved"):
            operation.complete()
        else:
            queue.append(operation)
        return operation

    @staticmethod
    def drain(queue: deque[Operation], last: Operation) -> None:
        """Complete a queue up to and including `last`."""
        while not last.done:
            queue.popleft().complete()

    def retire_one(self) -> bool:
        """Complete one operation; False where there is none."""
        while True:
            busy = [q for q in self.queues if q]
            if not busy and not self.free:
                return False
            if busy and (not self.free or self.random.random() < self.ordered_first):
                operation = self.random.choice(busy).popleft()
            else:
                at = self.random.randrange(len(self.free))
                self.free[at], self.free[-1] = self.free[-1], self.free[at]
                operation = self.free.pop()
            if not operation.done:
                operation.complete()
                return True

    def retire_all(self) -> None:
        while self.retire_one():
            pass
