"""A run: requests in flight, their replies in order, until there are tasks enough."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from belle.endpoint import Connection, Endpoint, Reply, Unanswered, connect
from belle.generation import prompts
from belle.generation.prompts import Prompt
from belle.generation.replies import Refusal, read_answer, read_instructions, read_tasks
from belle.generation.seeds import Seed, Task, digest
from belle.generation.state import State
from belle.journal import Journal, Line, Record
from gptq.errors import UserError

SIMILAR = "too similar"
UNANSWERED = "no answer"
# In a row: then the endpoint, or the teacher, is of no use.
MOST_UNANSWERED = 8
MOST_FRUITLESS = 100


@dataclass(frozen=True)
class Settings:
    """What is asked of the teacher; with the seeds and the model's name it decides the prompts."""

    language: str = "zh"
    two_stage: bool = False
    num_prompt_instructions: int = 3
    """Examples in a prompt."""
    similarity: float = 0.7
    """The highest ROUGE-L F1 of a new instruction with any other."""
    seed: int | None = None
    """Draws kinds and examples; if given, requests have seeds too, for endpoints that take them."""
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0

    def identity(self, seeds: Sequence[Seed], endpoint: Endpoint) -> Line:
        """Whatever decides what the journal holds."""
        wording = repr((prompts.WORDS, prompts.KINDS, prompts.TASKS, prompts.INSTRUCTIONS))
        return {
            **asdict(self),
            "model_name": endpoint.model,
            "api": endpoint.api,
            "seed_tasks_path": digest(seeds),
            "prompts": hashlib.sha256(wording.encode()).hexdigest()[:16],
        }


class Run:
    """Requests in flight, and what becomes of their replies."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        seeds: Sequence[Seed],
        journal: Journal,
        *,
        state: State,
        count: int,
        concurrency: int,
        show: Callable[[], None],
    ) -> None:
        """state: with all lines of the journal added.
        count: tasks to accept.
        concurrency: requests in flight. It changes nothing in what is accepted: the prompt of a
            request depends on its number alone, and its reply waits for those before it.
        show: is called after each reply."""
        self._endpoint, self._settings, self._seeds = endpoint, settings, seeds
        self._journal, self._state, self._show = journal, state, show
        self._count, self._concurrency = count, concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._requests: deque[asyncio.Task[Reply | Unanswered]] = deque()
        self._answers: deque[asyncio.Task[None]] = deque()
        self._unanswered: list[Line] = []
        self._fruitless = 0

    async def run(self) -> None:
        """Ask until there are enough tasks.

        Raises UserError if the endpoint refuses or does not answer, or if nothing that it answers
        is accepted. What is in the journal stays.
        """
        if len(self._state.accepted) >= self._count:
            return
        async with connect(self._endpoint) as connection:
            try:
                await self._until_enough(connection)
            finally:
                tasks = [*self._requests, *self._answers]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_enough(self, connection: Connection) -> None:
        state = self._state
        self._start_answers(connection, state.waiting)
        while (missing := self._count - len(state.accepted)) > 0:
            missing -= len(state.waiting)
            if self._answers and (missing <= 0 or len(self._answers) > 2 * self._concurrency):
                await self._answers.popleft()
                continue
            self._start_requests(connection, missing)
            reply = await self._requests.popleft()
            before = len(state.admitted)
            self._write(self._admit(reply), reply)
            if self._settings.two_stage:
                self._start_answers(connection, range(before, len(state.admitted)))

    def _start_requests(self, connection: Connection, missing: int) -> None:
        """Keep requests in flight, but no more than may be of use."""
        settings, seed = self._settings, self._settings.seed or 0
        make = prompts.instructions_prompt if settings.two_stage else prompts.tasks_prompt
        useful = min(self._concurrency, -(-missing // prompts.TASKS))
        while len(self._requests) < max(1, useful):
            number = self._state.requests + len(self._requests)
            examples = prompts.draw(self._seeds, settings.num_prompt_instructions, seed, number)
            prompt = make(examples, settings.language, seed, number)
            asking = self._ask(connection, prompt, number)
            self._requests.append(asyncio.create_task(asking))

    def _start_answers(self, connection: Connection, numbers: Iterable[int]) -> None:
        for number in numbers:
            answering = self._answer(connection, number)
            self._answers.append(asyncio.create_task(answering))

    async def _ask(self, connection: Connection, prompt: Prompt, number: int) -> Reply | Unanswered:
        settings = self._settings
        async with self._slots:
            try:
                return await connection.ask(
                    [{"role": "user", "content": prompt.text}],
                    stop=prompt.stop,
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=None if settings.seed is None else settings.seed + number,
                )
            except Unanswered as why:
                return why

    async def _answer(self, connection: Connection, number: int) -> None:
        instruction, language = self._state.admitted[number]["instruction"], self._settings.language
        reply = await self._ask(connection, prompts.answer_prompt(instruction, language), number)
        line: Line = {"answer": number, "output": None}
        if isinstance(reply, Unanswered):
            line["refused"] = [_unanswered(reply, instruction)]
        else:
            line["tokens"] = reply.tokens
            result = read_answer(instruction, reply.text, reply.cut, language)
            if isinstance(result, Refusal):
                line["refused"] = [_refused(result)]
            else:
                line["output"] = result.output
        self._write(line, reply)

    def _admit(self, reply: Reply | Unanswered) -> Line:
        """The journal's line of the next request."""
        line: Line = {"request": self._state.requests, "tasks": [], "refused": []}
        if isinstance(reply, Unanswered):
            line["refused"].append(_unanswered(reply))
            return line
        line["tokens"] = reply.tokens
        read = read_instructions if self._settings.two_stage else read_tasks
        results = read(reply.text, reply.cut, self._settings.language)
        line["refused"] = [_refused(it) for it in results if isinstance(it, Refusal)]
        tasks = [it for it in results if isinstance(it, Task)]
        for task, similar in zip(
            tasks, self._state.pool.compare([it.instruction for it in tasks]), strict=True
        ):
            record = asdict(task)
            if self._settings.two_stage:
                del record["output"]
            if similar.highest > self._settings.similarity:
                closest, score = next(iter(similar.most_similar.items()))
                line["refused"].append({"reason": SIMILAR, **record, "to": closest, "score": score})
                continue
            record["most_similar_instructions"] = similar.most_similar
            record["avg_similarity_score"] = similar.average
            line["tasks"].append(record)
        return line

    def _write(self, line: Line, reply: Reply | Unanswered) -> None:
        """Make a line durable, and take it in. One without an answer becomes durable only with the
        next that has one: if the endpoint has gone, the next run asks again."""
        self._unanswered.append(line)
        if isinstance(reply, Reply):
            for it in self._unanswered:
                self._journal.append(it)
            self._unanswered.clear()
        elif len(self._unanswered) >= MOST_UNANSWERED:
            raise UserError(
                f"{self._endpoint.base_url}: does not answer ({reply}); run again when it does, "
                "what was received is kept"
            )
        self._state.add(line)
        outputs = any(it.get("output") for it in (line, *line.get("tasks", ())))
        self._fruitless = 0 if outputs else self._fruitless + 1
        self._show()
        if self._fruitless >= MOST_FRUITLESS:
            reason = self._state.refused.most_common(1)[0][0]
            raise UserError(
                f"{self._endpoint.model}: its last {MOST_FRUITLESS} replies had no task to accept "
                f"(mostly: {reason}); see the file of refused tasks, and give another --model_name "
                "or --two_stage"
            )


def _unanswered(why: Unanswered, instruction: str = "") -> Record:
    return {"reason": UNANSWERED, "why": str(why), "instruction": instruction}


def _refused(refusal: Refusal) -> Record:
    return {"reason": refusal.reason, **asdict(refusal.task)}
