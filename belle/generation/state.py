"""What a run has received so far, and what that amounts to."""

from collections import Counter
from collections.abc import Callable

from belle.generation.similarity import Pool
from belle.journal import Line, Record


class State:
    """The sum of a journal's lines, the same whether they are read back or just made.

    A request admits tasks, in the order of the requests' numbers. In two stages they have no output
    yet: an answer gives it, in any order. `accepted` grows in the order of admission.
    """

    def __init__(self, pool: Pool, refuse: Callable[[Record], None]) -> None:
        """pool: gets every instruction that is admitted.
        refuse: is called with every refused task and its reason."""
        self.requests = 0
        """How many have been replied to, which is the number of the next one."""
        self.admitted: list[Record] = []
        """Without "output" while there is no answer; it is None if the answer was refused."""
        self.accepted: list[Record] = []
        self.refused: Counter[str] = Counter()
        """Tasks by reason."""
        self.tokens = 0
        self.pool = pool
        self._settled = 0
        self._refuse = refuse

    @property
    def waiting(self) -> list[int]:
        """Numbers of the admitted tasks without an answer."""
        numbers = range(self._settled, len(self.admitted))
        return [number for number in numbers if "output" not in self.admitted[number]]

    def add(self, line: Line) -> None:
        if "request" in line:
            self.requests += 1
            for record in line["tasks"]:
                self.pool.add(record["instruction"])
                self.admitted.append(dict(record))
        elif "answer" in line:
            self.admitted[line["answer"]]["output"] = line["output"]
        self.tokens += line.get("tokens", 0)
        for refused in line.get("refused", ()):
            self.refused[refused["reason"]] += 1
            self._refuse(refused)
        while self._settled < len(self.admitted) and "output" in self.admitted[self._settled]:
            if self.admitted[self._settled]["output"] is not None:
                self.accepted.append(self.admitted[self._settled])
            self._settled += 1
