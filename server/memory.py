"""`WorkingMemory`: what calls hold while they work and what is kept in memory, against one budget."""

import threading

from pydantic import ByteSize

from engine.cost import Cost, what_fits
from server.store import OutOfSpace, SessionStore

MEMORY_BUDGET = 2 << 30


class TooMuchMemory(OutOfSpace):
    """Work that would hold more than there is room for; nothing of it was done."""


class WorkingMemory:
    """Asked before work begins. What the store can let go of, because it is on the disk too, makes room for work."""

    def __init__(self, store: SessionStore, budget: int = MEMORY_BUDGET) -> None:
        self._store, self.budget = store, budget
        self._held: dict[object, int] = {}
        self._lock = threading.Lock()

    def take(self, who: object, cost: Cost, length: int) -> None:
        """Room for the work of a call on a prompt of `length` tokens. Raises `TooMuchMemory`, and takes none then."""
        with self._lock:
            others = sum(held for other, held in self._held.items() if other is not who)
            kept = self._store.shrink(max(self.budget - others - cost.nbytes, 0))
            if others + kept + cost.nbytes > self.budget:
                raise self._too_much(cost, length, others, kept)
            self._held[who] = cost.nbytes

    def give_back(self, who: object) -> None:
        """The call has ended."""
        with self._lock:
            self._held.pop(who, None)

    def _too_much(self, cost: Cost, length: int, others: int, kept: int) -> TooMuchMemory:
        free = max(self.budget - others - kept, 0)
        needs, left, may = (ByteSize(number).human_readable() for number in (cost.nbytes, free, self.budget))
        holding = {
            "calls that work now hold {}: call again when they have ended": others,
            "captures and caches hold {}: release what is no longer needed": kept,
        }
        taken = [said.format(ByteSize(held).human_readable()) for said, held in holding.items() if held]
        said = f"this needs {needs} while it works, and {left} of the {may} for calls and captures are free"
        fits = f"What would fit: {what_fits(cost, length, free)}. Or start with a larger --memory-budget"
        return TooMuchMemory(f"{'; '.join([said, *taken])}. Nothing was computed. {fits}")
