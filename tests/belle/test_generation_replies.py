"""Tasks in replies of many forms, and the reasons for which others are refused."""

import pytest

from belle.generation.replies import Refusal, read_answer, read_instructions, read_tasks
from belle.generation.seeds import Task

POEM = Task("写一首关于春雨的短诗", "", "细雨落在瓦上。")
SUM = Task("计算下面两个数的和", "3 和 4", "7")

FORMS = {
    "goes on after the prompt": """ 写一首关于春雨的短诗
4. 输入: 无
4. 输出: 细雨落在瓦上。
###
5. 指令: 计算下面两个数的和
5. 输入: 3 和 4
5. 输出: 7
###
""",
    "labels of its own, a remark before, wide colons": """好的，以下是新任务：

4. 指令：写一首关于春雨的短诗
4. 输入：无。
4. 输出：细雨落在瓦上。

###
5. 指令：计算下面两个数的和
5. 输入：3 和 4
5. 输出：
7
###
6.""",
    "bold, no separators, no numbers": """**指令：** 写一首关于春雨的短诗
**输入：** （无）
**输出：** 细雨落在瓦上。

**指令**：计算下面两个数的和
**输入**：3 和 4
**输出**：7""",
    "headings and rules": """## 任务 4

### 指令
写一首关于春雨的短诗
### 输入
无需输入
### 输出
细雨落在瓦上。

---

## 任务 5

### 指令
计算下面两个数的和
### 输入
3 和 4
### 输出
7
""",
    "English labels": """4) Instructions: 写一首关于春雨的短诗
4) Input: <noinput>
4) Output: 细雨落在瓦上。
5) Instruction: 计算下面两个数的和
5) Input: 3 和 4
5) Output: 7""",
    "no input at all, numbers after the labels, thoughts": """<think>指令: 想一想
输出: 嗯</think>
- 指令4：写一首关于春雨的短诗
- 输出4：细雨落在瓦上。
- 指令5：计算下面两个数的和
- 输入5：3 和 4
- 输出5：7""",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_tasks_of_every_form(text):
    assert read_tasks(text, False, "zh") == [POEM, SUM]


@pytest.mark.parametrize("spelling", ["none", "None.", "N/A", '"no input"', "no input needed", ""])
def test_no_input_in_english(spelling):
    text = f"Instruction: Name a large river\nInput: {spelling}\nOutput: The Danube."
    assert read_tasks(text, False, "en") == [Task("Name a large river", "", "The Danube.")]


@pytest.mark.parametrize("given", ["nonesuch", "不需要的东西", "😀", "无花果"])
def test_an_input_that_only_looks_like_none(given):
    (task,) = read_tasks(f"指令: 解释下面的词\n输入: {given}\n输出: 好", False, "zh")
    assert task.input == given


def test_labels_in_an_output_belong_to_it():
    output = "读入一行。例如：\n输入: 3\n输出: 9\n\n```\n# 平方\nprint(int(input()) ** 2)\n```"
    text = (
        f"指令: 求一个数的平方\n输入: 无\n输出: {output}\n###\n5. 指令: 说出三种水果\n5. 输出: 桃"
    )
    first, second = read_tasks(text, False, "zh")
    assert first.output == output
    assert second == Task("说出三种水果", "", "桃")


def test_numbers_and_marks_in_an_output_stay():
    output = "1. **桃**\n2. __init__\n3. 20.\n---\n42"
    (task,) = read_tasks(f"指令: 随便列出几样东西\n输出: {output}", False, "zh")
    assert task.output == output


def test_the_last_task_of_a_reply_that_is_cut_is_refused():
    first, second = read_tasks(FORMS["English labels"], True, "zh")
    assert first == POEM
    assert second == Refusal("cut by length", SUM)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no task in the reply"),
        ("抱歉，我不能这样做。", "no task in the reply"),
        ("指令: 写一首关于春雨的短诗\n输入: 无", "no output"),
        ("指令:\n输入: 无\n输出: 好", "no instruction"),
        ("指令: 写诗\n输出: 好", "length of the instruction"),
        (f"指令: {'写' * 151}\n输出: 好", "length of the instruction"),
        ("指令: write a short poem\n输出: 好", "instruction in another language"),
        ("指令: 你叫什么名字\n输出: 我是 ChatGPT。", "self-mention"),
        ("指令: 你叫什么名字\n输出: I'm a chatbot.", "self-mention"),
        ("指令: 你叫什么名字\n输出: 作为一个AI语言模型，我没有名字。", "self-mention"),
    ],
)
def test_refusals(text, reason):
    (refusal,) = read_tasks(text, False, "zh")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


@pytest.mark.parametrize(
    ("instruction", "accepted"),
    [
        ("Translate 你好 into English", True),
        ("把这句话 translate 成英文", False),
        ("Explain what an Egypt trip costs", True),
    ],
)
def test_language_of_english_tasks(instruction, accepted):
    (result,) = read_tasks(f"Instruction: {instruction}\nOutput: yes", False, "en")
    assert isinstance(result, Task) == accepted


LISTS = {
    "goes on": " 写一首诗，写春雨\n5. 说出三种水果",
    "numbered, with a remark": "以下是新指令：\n4. 写一首诗，写春雨\n\n5. **说出三种水果**",
    "lines": "写一首诗，写春雨\n\n- 说出三种水果\n",
    "numbered twice, bold within": "4. 1. **写一首诗**，写春雨\n**5.** 2) 说出三种水果",
    "an item of two lines": "(1) 写一首诗，\n   写春雨\n(2) 说出三种水果",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_lists_of_instructions(text):
    found = [task.instruction.replace(" ", "") for task in read_instructions(text, False, "zh")]
    assert found == ["写一首诗，写春雨", "说出三种水果"]


def test_a_list_that_is_cut_or_empty():
    assert [type(it) for it in read_instructions(LISTS["lines"], True, "zh")] == [Task, Refusal]
    assert read_instructions(" \n", False, "zh")[0].reason == "no task in the reply"


def test_answers():
    assert read_answer("说出三种水果", "<think>嗯</think>\n桃", False, "zh").output == "桃"
    for text, cut in (("", False), ("桃、", True), ("我是一个语言模型", False)):
        assert isinstance(read_answer("说出三种水果", text, cut, "zh"), Refusal)


@pytest.mark.parametrize("repeated", ["*", " ", "-", "---\n", "1.", "**", "输入: "])
def test_a_teacher_that_repeats_itself_is_read_in_linear_time(repeated):
    """A pattern that tries every split of the repeats would take minutes."""
    text = repeated * 20_000
    (task,) = read_tasks(f"指令: 写一首诗吧\n输入: {text}x\n输出: {text}x", False, "zh")
    assert task.output.endswith("x")
    assert read_instructions(f"1. {text}x", False, "zh")
