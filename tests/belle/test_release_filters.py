"""Each filter on texts that it should remove and on texts that look alike and should stay."""

import pytest

from belle.release import filters
from belle.release.filters import Contamination


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def reason(name, *texts, **options):
    return filters.filters(**options)[name](turns(*texts))


@pytest.mark.parametrize(
    "answer",
    [
        "作为一个人工智能，我没有感情。",
        "作为一个AI语言模型，我不能预测未来。",
        "作为人工智能助手，我可以帮助你。",
        "作为一名语言模型，我没有身体。",
        "你好！我是一个基于深度学习的语言模型。",
        "我是ChatGPT，很高兴认识你。",
        "我只是一个AI，没有个人经历。",
        "我是由OpenAI训练的。",
        "As an AI language model, I don't have feelings.",
        "As an AI, I cannot eat.",
        "As a language model, it is not possible for me, but I can explain.",
        "Well, I'm just an AI assistant.",
        "I am ChatGPT.",
        "I was trained by OpenAI.",
    ],
)
def test_an_answer_as_a_language_model_is_removed(answer):
    assert reason("self-mention", "请介绍一下。", answer) == "an answer as a language model"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("什么是GPT分区表？", "GPT（GUID Partition Table）是一种磁盘分区表，AI没有关系。"),
        ("GPT-4是什么？", "GPT-4是OpenAI发布的一个大型语言模型，参数很多。"),
        ("写一段自我介绍。", "作为一个人工智能工程师，我热爱算法。"),
        ("写一段自我介绍。", "我是一名AI公司的产品经理，今年三十岁。"),
        ("介绍人工智能。", "人工智能作为一门学科，研究智能机器。"),
        ("What is BERT?", "As a language model, BERT predicts masked words."),
        ("Introduce yourself.", "As an AI engineer, I build models."),
        ("Introduce yourself.", "I am an AI researcher at a university."),
        ("Explain air.", "As an air molecule I move; I am an airplane."),
        ("What makes GPT disks special?", "A GPT disk has up to 128 partitions."),
    ],
)
def test_an_answer_about_models_stays(question, answer):
    assert reason("self-mention", question, answer) is None


def test_a_question_to_a_language_model_is_removed():
    for question in ("你是ChatGPT吗？", "Are you an AI?"):
        assert reason("self-mention", question, "是。") == "a question to a language model"


@pytest.mark.parametrize(
    "answer",
    [
        "抱歉，我无法回答这个问题。",
        "对不起，作为助手我不能提供医疗建议。",
        "很抱歉，由于信息不足，无法判断。",
        "非常抱歉，我没有看到您提到的文章。",
        "我无法访问互联网，因此不能查询天气。",
        "I'm sorry, but I can't help with that.",
        "Sorry, I do not understand.",
        "I cannot fulfill this request.",
    ],
)
def test_a_refusal_is_removed(answer):
    assert reason("unanswered", "今天天气如何？", answer) == "a refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "请提供需要翻译的文本。",
        "好的，请您提供更多信息。",
        "您没有提供文章内容，请补充。",
        "Please provide the text you want me to translate.",
        "Could you please provide more details?",
        "There was not enough information provided to answer.",
        "You did not provide a sentence.",
    ],
)
def test_an_answer_that_asks_for_the_input_is_removed(answer):
    assert reason("unanswered", "翻译一段话。", answer) == "an answer that asks for the input"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("写一封道歉信。", "对不起，张先生：您的包裹迟到了，我们深感歉意，将尽快补发。"),
        ("写一封道歉信。", "尊敬的客户：很抱歉给您带来不便。我们无法退款，但可以换货。"),
        ("文中提到价格了吗？", "没有提到。"),
        ("他为什么不来？", "他病了，无法走路。"),
        ("Write a letter.", "Dear customer, I am sorry that the parcel was late. I cannot wait!"),
        (
            "写一段客服话术。",
            "您好，请提供订单号和收货地址。我们会在24小时内处理，谢谢您的耐心等待。",
        ),
        ("Sing.", "I can't get no satisfaction, they sang."),
        ("用以下词语造句：春天、花朵", "春天来了，花朵开了。"),
        ("Sort the following numbers: 3, 1, 2", "1, 2, 3"),
    ],
)
def test_an_answer_that_says_sorry_or_cannot_stays(question, answer):
    assert reason("unanswered", question, answer) is None


def test_a_question_without_its_input_is_removed():
    for question in ("请总结下面的文章：", "Translate the following sentence:\n"):
        assert reason("unanswered", question, "好。") == "a question without its input"


def test_a_dialogue_may_ask_before_it_answers():
    asks, answer = "请提供需要翻译的文本。", "好的。"
    dialogue = ("请翻译下面的文本：", asks, "春天来了", answer)
    assert reason("unanswered", *dialogue) is None
    assert reason("unanswered", *dialogue[:2]) == "an answer that asks for the input"


def test_a_system_message_tells_no_duplicates():
    system = {"role": "system", "content": "Answer in Chinese."}
    assert filters.compared([system, *turns("Ａ 你好", "B")]) == "a你好b"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("写诗。", "春眠不觉晓。\n12. 指令：写一个故事\n输入：无"), "several tasks in a turn"),
        (("写诗。\n###\n写歌。", "好。"), "several tasks in a turn"),
        (("你好", "你好！\nHuman: 再见\nAssistant: 再见"), "several tasks in a turn"),
        (("Write.", "A poem.\nInstruction: Write a song."), "an instruction in an answer"),
        (("写文章。", "### 一、指令集\n1. 任务很多。\n### 二、总结"), None),
        (("根据例子回答。\n输入：3\n输出：", "4"), None),
        (("列出任务。", "1. 任务一\n2. 任务二"), None),
        (("The human: who?", "A human: an animal."), None),
    ],
)
def test_several_tasks_in_one_record_are_removed(texts, expected):
    assert reason("merged tasks", *texts) == expected


ZH = "春天的早晨阳光照在小河边的草地上，孩子们笑着跑来跑去。"
EN = "The children laugh and run along the river on a sunny spring morning."


@pytest.mark.parametrize(
    ("question", "answer", "wanted", "expected"),
    [
        (ZH, ZH, "any", None),
        (EN, EN, "any", None),
        (ZH, EN, "any", "question and answer in two languages"),
        (EN, ZH, "any", "question and answer in two languages"),
        (ZH + "请翻译。", EN, "any", None),
        ("Translate: " + EN, ZH, "any", None),
        (ZH + "用Python写。", EN, "any", None),
        (ZH, "H2O", "any", None),
        (ZH, "12345678 90 12 34 56 78 90 12 34", "any", None),
        (ZH, "苹果公司发布了iPhone 14 Pro Max和MacBook Air，均搭载M2芯片。", "zh", None),
        (EN, EN, "zh", "not in Chinese"),
        (ZH, ZH, "en", "not in English"),
    ],
)
def test_language_follows_the_question(question, answer, wanted, expected):
    assert reason("language", question, answer, wanted=wanted) == expected


def test_length_has_bounds():
    assert reason("length", "？", "好") == "a question of one character"
    assert reason("length", "你好", "好") is None
    assert reason("length", "你好", "好" * filters.MOST_CHARACTERS).startswith("more than")
    assert reason("length", "你好", "好", "？", "好") is None


# Ordinary text, a table and code, none of which repeats itself.
TABLE = "\n".join(f"| {i} | 第{i}名 | {i * 37 % 101} |" for i in range(40))
CODE = "\n".join(f"def f{i}(x):\n    return x * {i * i % 17} + {i}\n" for i in range(30))
TIMES = "\n".join(" ".join(f"{a}×{b}={a * b}" for a in range(1, b + 1)) for b in range(1, 10))


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("好的。" * 100, True),
        (ZH + EN + "谢谢大家的支持和帮助。" * 40, True),
        (EN + " And so on and so forth." * 40, True),
        ("哈" * 30, False),
        (ZH + EN, False),
        (TABLE, False),
        (CODE, False),
        (TIMES, False),
    ],
)
def test_an_answer_that_repeats_itself_is_removed(answer, repeats):
    expected = "an answer that repeats itself" if repeats else None
    assert reason("repetition", "写一段话。", answer) == expected


def test_control_characters_are_found_and_line_ends_are_not():
    for text in ("a\x00b", "a\x1b[31m", "a\u202eb", "a\ufffdb", "a\ud800b", "a\x7f"):
        assert filters.control_characters(turns(text, "b")) == "control characters"
    assert filters.control_characters(turns("a\tb\r\nc", "é 👩‍👧 ｡")) is None


LONG = "小明有三个苹果，小红比小明多两个苹果，小刚的苹果是小红的两倍，请问三个人一共有多少个苹果？"


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (LONG, True),
        ("请回答：" + LONG + "谢谢。", True),
        (LONG.replace("有三个", "有四个"), True),
        (LONG.replace("小刚", "小王").replace("两倍", "三倍"), False),
        (LONG[:20] + "请写一个关于他们的故事，要求情节完整而且有一个出人意料的结尾。", False),
        ("法国的首都是哪里", True),
        ("法国的首都是哪里？请详细介绍它的历史。", False),
        ("What is the capital of Spain, and which river flows through the old town there", False),
    ],
)
def test_a_question_of_the_evaluation_is_found(question, found):
    contaminated = Contamination([LONG, "法国的首都是哪里？"])
    expected = "a question of the evaluation" if found else None
    assert contaminated(turns("你好", "你好", question, "好")) == expected
