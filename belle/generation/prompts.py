"""What the teacher is asked: a function of the seeds, the run's seed and the request's number."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from belle.generation.seeds import Seed, Task

# Of a full request: what fits into 1,024 tokens. Instructions alone are shorter.
TASKS = 5
INSTRUCTIONS = 10

KINDS = {
    "extract": {"zh": "信息抽取", "en": "information extraction"},
    "classification": {"zh": "分类", "en": "classification"},
    "closed qa": {"zh": "根据给定材料问答", "en": "questions about a given text"},
    "summarization": {"zh": "摘要", "en": "summarization"},
    "translation": {"zh": "翻译", "en": "translation"},
    "rewrite": {"zh": "改写", "en": "rewriting"},
    "brainstorming": {"zh": "头脑风暴", "en": "brainstorming"},
    "math": {"zh": "数学题", "en": "mathematics"},
    "code": {"zh": "编程", "en": "programming"},
    "cot": {"zh": "分步推理", "en": "reasoning step by step"},
    "open qa": {"zh": "常识问答", "en": "questions of general knowledge"},
    "generation": {"zh": "写作", "en": "writing"},
}
"""BELLE's twelve kinds of tasks, and how a prompt calls them."""


@dataclass(frozen=True)
class Words:
    """A language's wording. {count} stands for a number, {kinds} for names of kinds."""

    labels: tuple[str, str, str]
    none: str
    comma: str
    tasks: str
    instructions: str
    of_kinds: str
    answer: str


WORDS = {
    "zh": Words(
        labels=("指令: ", "输入: ", "输出: "),
        none="无",
        comma="、",
        tasks="""请接着下面的例子，再出 {count} 道新任务，用来训练一个中文助手。要求：
1. 各任务的动词、语气、句式和题材都要不同，也不要改写例子。
2. 只凭文字就能完成：不看图、不听声音、不上网、不操作设备。
3. 指令用中文写，一到两句话，问句或祈使句都可以。
4. 输入是指令要处理的材料，要具体、真实、完整，不超过一百字，不用占位符；不需要材料时写“无”。
5. 输出要正确、完整地回应指令和输入，一般不超过一百五十字。
6. 每道任务以 ### 开头，编号、指令、输入、输出的写法与例子相同。""",
        instructions="""请接着下面的例子，再写 {count} 条新指令，用来训练一个中文助手。
各条的动词、语气、句式和题材都要不同，也不要改写例子。
每条用中文写成一行，自身包含回答所需的全部材料，只凭文字就能完成。只写指令，不写回答。""",
        of_kinds="新任务的类型在这几种里平均分配：{kinds}。",
        answer="请完成下面的任务，只写答案，不要重复题目。\n\n{instruction}",
    ),
    "en": Words(
        labels=("Instruction: ", "Input: ", "Output: "),
        none="none",
        comma=", ",
        tasks="""Continue the examples below with {count} new tasks to train an assistant on.
1. Vary verbs, tone, sentence form and subject from task to task, and do not reword the examples.
2. Text alone must suffice: no pictures, no sound, no internet, no devices.
3. An instruction is one or two sentences in English, a question or a request.
4. An input is the material to work on: specific, real, complete, without placeholders, at most
   80 words. If there is no material, write "none".
5. An output answers the instruction correctly and completely, as a rule in at most 100 words.
6. Begin each task with ###, and write number, instruction, input and output as in the examples.""",
        instructions="""Continue the list below with {count} instructions to train an assistant on.
Vary verbs, tone, sentence form and subject, and do not reword the examples. Each is one line of
English with all the material that an answer needs, and text alone must suffice for it. Write
instructions only, no answers.""",
        of_kinds="Spread the new ones evenly over these kinds: {kinds}.",
        answer="Do this task. Write the answer alone, without the task.\n\n{instruction}",
    ),
}


@dataclass(frozen=True)
class Prompt:
    text: str
    stop: str | None
    """Where the teacher would begin one task too many."""


def draw(seeds: Sequence[Seed], count: int, seed: int, request: int) -> list[Seed]:
    """The examples of a request, all different; kinds take turns in an order that is shuffled
    anew each time that all have been drawn."""
    kinds = sorted({it.kind for it in seeds})
    chooser = random.Random(f"{seed} {request}")
    chosen: list[Seed] = []
    for place in range(request * count, (request + 1) * count):
        turn, index = divmod(place, len(kinds))
        kind = random.Random(f"{seed} kinds {turn}").sample(kinds, len(kinds))[index]
        left = [it for it in seeds if it not in chosen]
        chosen.append(chooser.choice([it for it in left if it.kind == kind] or left))
    return chosen


def tasks_prompt(examples: Sequence[Seed], language: str, seed: int, request: int) -> Prompt:
    """Ask for whole tasks. The text ends with the label of the next instruction."""
    words, chooser = WORDS[language], random.Random(f"{seed} {request} instances")
    blocks = [
        _block(i, chooser.choice(it.instances), words) for i, it in enumerate(examples, start=1)
    ]
    number = len(examples) + 1
    begun = f"###\n{number}. {words.labels[0].rstrip()}"
    text = "\n".join([_demands(words.tasks, TASKS, examples, language), *blocks, begun])
    return Prompt(text, stop=f"###\n{number + TASKS}.")


def instructions_prompt(examples: Sequence[Seed], language: str, seed: int, request: int) -> Prompt:
    """Ask for a numbered list of instructions, each a line that holds its input too."""
    words, chooser = WORDS[language], random.Random(f"{seed} {request} instances")
    lines = []
    for i, example in enumerate(examples, start=1):
        lines.append(f"{i}. {one_line(chooser.choice(example.instances))}")
    begun = f"{len(examples) + 1}."
    demands = _demands(words.instructions, INSTRUCTIONS, examples, language)
    return Prompt("\n".join([demands, "", *lines, begun]), stop=None)


def one_line(task: Task) -> str:
    """An instruction with its input."""
    return " ".join(f"{task.instruction} {task.input}".split())


def answer_prompt(instruction: str, language: str) -> Prompt:
    """Ask for the output of one instruction."""
    return Prompt(WORDS[language].answer.format(instruction=instruction), stop=None)


def _demands(demands: str, count: int, examples: Sequence[Seed], language: str) -> str:
    words = WORDS[language]
    kinds = dict.fromkeys(KINDS[it.kind][language] for it in examples if it.kind in KINDS)
    text = demands.format(count=count)
    return f"{text}\n{words.of_kinds.format(kinds=words.comma.join(kinds))}" if kinds else text


def _block(number: int, task: Task, words: Words) -> str:
    texts = (task.instruction, task.input or words.none, task.output)
    fields = [f"{number}. {label}{text}" for label, text in zip(words.labels, texts, strict=True)]
    return "\n".join(["###", *fields])
