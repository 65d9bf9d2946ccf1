"""Why a conversation is not released. Each filter is a function to a reason, or None to keep it.

They are rules of thumb for what language models write when they are asked for training data, in
Chinese and English. A rule looks for a phrase only in the turns and places that it belongs in, so
that a record about GPT, or a letter that says sorry, is kept.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import TypeAlias

from belle.records import Conversation
from belle.text import tokens

Filter: TypeAlias = Callable[[Conversation], str | None]

LANGUAGES = ("any", "zh", "en")
# Characters of a conversation. A longer one is cut by the context of the models it is made for.
MOST_CHARACTERS = 16_384
LEAST_QUESTION = 2
# Answers with fewer words are names, formulas and labels, which are in no language.
LEAST_WORDS = 8
# Share of Han characters from which a text is Chinese, and up to which it is English. Between
# them are Chinese texts full of names and terms.
CHINESE, ENGLISH = 0.3, 0.1
# Compressed bytes per byte. Chinese and English text have 0.4 to 0.7, code and tables 0.2 to 0.4.
REPETITIVE = 0.15
TAIL = 400
LEAST_TAIL = 200

_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffd-\uffff\ud800-\udfff]"
)
_LABEL = r"(?:指令|任务|Instruction|Task)"
_MERGED = re.compile(
    rf"^[ \t]*(?:###[ \t]*$|#*[ \t]*\d+[ \t]*[.、．)][ \t]*{_LABEL}[ \t]*\d*[ \t]*[:：]"
    r"|(?:Human|Assistant)[ \t]*[:：])",
    re.MULTILINE,
)
_MERGED_ANSWER = re.compile(rf"^[ \t]*#*[ \t]*{_LABEL}[ \t]*\d*[ \t]*[:：]", re.MULTILINE)

# Names are Latin letters in Chinese text, in which \b does not end a word.
_MODEL = (
    r"(?:人工智能|(?<![A-Za-z])AI(?![A-Za-z]))(?:大?语言|对话|聊天)?(?:大?模型|助手|助理|程序|系统|"
    r"机器人)?|(?:大型?)?语言模型|聊天机器人|(?<![A-Za-z])(?:ChatGPT|GPT-?\d*)(?![A-Za-z])"
)
_COUNTED = r"(?:一个|一名|一款|一种|一位|个)?(?:基于[^，。]{1,12}的)?"
# What makes it a person or a thing that has to do with AI.
_OTHER = (
    r"(?!\s*(?:的?(?:工程师|专家|研究|领域|公司|学生|爱好者|开发|从业|教授|老师|科学家|顾问|专业|"
    r"团队|创业|产品|技术|行业|分区|磁盘)))"
)
_SELF_ZH = re.compile(rf"(?:作为|身为|我(?:只|仅仅)?是){_COUNTED}(?:{_MODEL}){_OTHER}")
_SELF_EN = re.compile(
    r"\bas an? (?:large )?(?:AI|artificial intelligence|language|chat)"
    r"(?: language)?(?: model| assistant| system|bot| chatbot)?\b(?! \w)[^.\n]{0,60}?\b(?:I|my)\b"
    r"|\b(?:I am|I'm|I’m)(?: just| only)? an? (?:large )?(?:AI|artificial intelligence|language)"
    r"(?: language)? (?:model|assistant|system|chatbot|program)\b"
    r"|\b(?:I am|I'm|I’m) (?:ChatGPT|GPT-?\d|an AI(?=[.,;!]| and| so| (?:creat|train|develop)ed))",
    re.IGNORECASE,
)
_MAKER = re.compile(
    r"我[^。！？\n]{0,12}(?:由|被|是)\s*OpenAI|\bI(?:'m| am| was)[^.\n]{0,40}\bby OpenAI\b",
    re.IGNORECASE,
)
_ASKS_MODEL = re.compile(
    r"你(?:是不是|是|叫)\s*(?:ChatGPT|GPT|OpenAI)|\bare you (?:ChatGPT|GPT|an? AI)\b", re.IGNORECASE
)

_SORRY_ZH = r"(?:(?:很|非常|真的)?(?:抱歉|对不起|不好意思|遗憾)[，,。.！!、\s]*)"
_SORRY_EN = r"(?:(?:I'm|I am|I’m)? ?(?:very |really )?sorry[,.!]? ?(?:but )?)"
_REFUSES = re.compile(
    rf"^{_SORRY_ZH}(?:但是?|不过)?(?:我|作为|这个问题|该问题|由于|因为|您没|你没|您未|你未|您的问题|"
    r"你的问题|无法|不能|没有)[^。！？\n]{0,24}(?:无法|不能|没有|没法|不会|不太?明白|不知道|不清楚|未能|不便)"
    rf"|^{_SORRY_ZH}(?:但是?)?(?:无法|不能)(?:回答|提供|完成|理解|判断)"
    r"|^(?:我(?:们)?)(?:无法|不能|没有办法)(?:回答|提供|完成|满足|协助|帮助|访问|浏览|打开|查看|执行)"
    rf"|^{_SORRY_EN}I (?:can't|can’t|cannot|can not|am unable|am not able|don't|do not|won't)\b"
    r"|^I (?:can't|can’t|cannot|can not|am unable to|am not able to|won't) (?:assist|help|answer|"
    r"provide|fulfill|fulfil|complete|access|browse|open|do that|comply)",
    re.IGNORECASE,
)
_ASKS_FOR_INPUT = re.compile(
    r"^[^。！？\n]{0,16}请(?:您|你)?(?:先)?(?:提供|给出|输入|补充|告诉我)(?:您|你)?(?:更多|完整|具体|需要|"
    r"要|待|相关|一[个段篇些]|文本|文章|句子|原文|问题|内容|信息|详细|足够|输入|数据)[^。！？\n]*"
    r"[。！？!]?\s*$"
    r"|^(?:由于|因为)?(?:您|你|题目|问题|输入)(?:中)?(?:没有|未|并未)(?:提供|给出|输入)"
    r"|(?:信息|输入|条件)(?:不足|不完整)[，,](?:因此|所以)?(?:我)?(?:无法|不能)"
    rf"|^{_SORRY_EN}?(?:please|could you|can you) (?:please )?(?:provide|give|share|specify) "
    r"(?:me |us )?(?:with )?(?:the|more|a|an|some|your|additional|further)\b[^.\n]*[.?!]?\s*$"
    r"|\b(?:no|not enough|insufficient) (?:input|information|context) (?:was |is |has been )?"
    r"(?:given|provided)\b|\b(?:you|the (?:question|prompt)) (?:did not|didn't|didn’t|does not) "
    r"(?:provide|give|include|specify)\b",
    re.IGNORECASE,
)
_LACKS_INPUT = re.compile(
    r"(?:以下|下面|下列|如下|下文|\bfollowing\b|\bbelow\b)[^\n]{0,40}[:：]\s*$", re.IGNORECASE
)

_HAN = re.compile("[\u3400-\u9fff]")
_WORD = re.compile(r"[^\W\d_\u3400-\u9fff]+")
_TRANSLATION = re.compile(
    r"翻译|译成|译为|译文|[英法德日俄韩外]语|[英日韩法德]文|中文|汉语|汉字|拼音|文言|双语|单词|语法|"
    r"\btranslat|\bin (?:English|Chinese|French|German|Japanese|Korean|Spanish|Russian)\b|"
    r"\b(?:Chinese|Mandarin|Pinyin)\b",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"代码|编程|编写.{0,12}(?:函数|程序|脚本|查询)|正则|算法|命令行|网址|公式|方程|缩写|"
    r"(?<![A-Za-z])(?:python|java|javascript|c\+\+|c#|sql|html|css|php|ruby|golang|rust|swift|bash|"
    r"shell|linux|json|xml|latex|excel|regex|code|script|function|program)(?![A-Za-z])",
    re.IGNORECASE,
)


def normalized(text: str) -> str:
    """A text by which duplicates are told: of one width and case, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def compared(conversation: Conversation) -> str:
    """The text by which duplicates are told. Many records may share a system message."""
    return normalized("".join(it["content"] for it in conversation if it["role"] != "system"))


def of_role(conversation: Conversation, role: str) -> list[str]:
    return [turn["content"] for turn in conversation if turn["role"] == role]


def control_characters(conversation: Conversation) -> str | None:
    """Characters that command a terminal, turn the direction of text or stand for lost bytes."""
    found = any(_CONTROLS.search(turn["content"]) for turn in conversation)
    return "control characters" if found else None


def length(conversation: Conversation) -> str | None:
    if len("".join(of_role(conversation, "user"))) < LEAST_QUESTION:
        return "a question of one character"
    if sum(len(turn["content"]) for turn in conversation) > MOST_CHARACTERS:
        return f"more than {MOST_CHARACTERS} characters"
    return None


def repetition(conversation: Conversation) -> str | None:
    """An answer that says the same again and again, or does from some place to its end."""
    for answer in of_role(conversation, "assistant"):
        if any(_is_repetitive(part) for part in (answer, answer[-TAIL:])):
            return "an answer that repeats itself"
    return None


def _is_repetitive(text: str) -> bool:
    data = text.encode()
    return len(data) >= LEAST_TAIL and len(zlib.compress(data)) < REPETITIVE * len(data)


def merged_tasks(conversation: Conversation) -> str | None:
    """Several tasks in one record: the numbered ones of a generator's reply, or another's turns."""
    answers = of_role(conversation, "assistant")
    if any(map(_MERGED_ANSWER.search, answers)):
        return "an instruction in an answer"
    if any(map(_MERGED.search, [*answers, *of_role(conversation, "user")])):
        return "several tasks in a turn"
    return None


def self_mention(conversation: Conversation) -> str | None:
    """An answer that speaks as a language model, or a question about which one it is."""
    for answer in of_role(conversation, "assistant"):
        if any(pattern.search(answer) for pattern in (_SELF_ZH, _SELF_EN, _MAKER)):
            return "an answer as a language model"
    if any(map(_ASKS_MODEL.search, of_role(conversation, "user"))):
        return "a question to a language model"
    return None


def unanswered(conversation: Conversation) -> str | None:
    """A refusal in any turn, and at the end an input that nobody gave."""
    answers = of_role(conversation, "assistant")
    if any(map(_REFUSES.search, answers)):
        return "a refusal"
    if _ASKS_FOR_INPUT.search(answers[-1]):
        return "an answer that asks for the input"
    if _LACKS_INPUT.search(conversation[-2]["content"]):
        return "a question without its input"
    return None


def han_share(text: str) -> float | None:
    """Han characters among the words of a text, each a word; None for fewer than LEAST_WORDS."""
    han = len(_HAN.findall(text))
    words = han + len(_WORD.findall(text))
    return None if words < LEAST_WORDS else han / words


def language(conversation: Conversation, wanted: str = "any") -> str | None:
    """A question in Chinese with an answer in English, or the other way, or not in `wanted`.

    Translation, language lessons, code and formulas may have both.
    """
    asked = "\n".join(of_role(conversation, "user"))
    if _TRANSLATION.search(asked) or _CODE.search(asked):
        return None
    question, answer = map(han_share, (asked, "\n".join(of_role(conversation, "assistant"))))
    known = [share for share in (question, answer) if share is not None]
    if any(share >= CHINESE for share in known) and any(share <= ENGLISH for share in known):
        return "question and answer in two languages"
    if wanted == "zh" and any(share < CHINESE for share in known):
        return "not in Chinese"
    if wanted == "en" and any(share > ENGLISH for share in known):
        return "not in English"
    return None


class Contamination:
    """Whether a conversation has a question of an evaluation set.

    As for Llama 2 (arXiv 2307.09288, A.6) a share of the question's tokens, SHARE, must lie in
    runs of GRAM that both have: an edit in a long question costs a few tokens, and a common
    opening alone is too little. A question of fewer tokens must be the same. Tokens are words and
    single Han characters.
    """

    GRAM = 13
    SHARE = 0.8

    def __init__(self, questions: Iterable[str]) -> None:
        self.questions = list(questions)

    @cached_property
    def _index(self) -> tuple[dict[str, list[tuple[int, int]]], list[int], set[str]]:
        """Question and place of each run; tokens of each question; questions without a run.

        Made in the process that needs it: it is many times as large as the questions.
        """
        places: dict[str, list[tuple[int, int]]] = {}
        words = list(map(tokens, self.questions))
        for number, question in enumerate(words):
            for place, gram in enumerate(self._grams(question)):
                places.setdefault(gram, []).append((number, place))
        short = {" ".join(question) for question in words if len(question) < self.GRAM}
        return places, list(map(len, words)), short

    def _grams(self, words: list[str]) -> list[str]:
        return [" ".join(words[i : i + self.GRAM]) for i in range(len(words) - self.GRAM + 1)]

    def __call__(self, conversation: Conversation) -> str | None:
        places, lengths, short = self._index
        for question in of_role(conversation, "user"):
            words = tokens(question)
            if len(words) < self.GRAM and " ".join(words) in short:
                return "a question of the evaluation"
            covered: dict[int, set[int]] = {}
            for gram in set(self._grams(words)) & places.keys():
                for number, place in places[gram]:
                    covered.setdefault(number, set()).update(range(place, place + self.GRAM))
            if any(len(it) >= self.SHARE * lengths[number] for number, it in covered.items()):
                return "a question of the evaluation"
        return None


def filters(wanted: str = "any", questions: Iterable[str] = ()) -> dict[str, Filter]:
    """The filters in their order. A record counts for the first that has a reason.

    wanted: one of LANGUAGES.
    questions: of an evaluation set.
    """
    chosen: dict[str, Filter] = {
        "length": length,
        "repetition": repetition,
        "merged tasks": merged_tasks,
        "self-mention": self_mention,
        "unanswered": unanswered,
        "language": partial(language, wanted=wanted),
    }
    if questions := list(questions):
        chosen["contamination"] = Contamination(questions)
    return chosen
