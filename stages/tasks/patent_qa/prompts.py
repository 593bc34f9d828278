"""The prompts: Chinese for a Chinese question, else English.

The prompt with pages as text is short so that small models can follow it.
"""

import re
import unicodedata
from collections.abc import Sequence

from stages.contract.records import PLACE, Message, escape_places
from stages.tasks.common.wording import is_chinese

READER = "Answer with the shortest exact words from the pages."


def _user_message(content: str) -> list[Message]:
    """One user message with this content, in a list."""
    return [{"role": "user", "content": content}]


# -- the answer --------------------------------------------------------------------------------------------------


def text_prompt(question: str, pages: Sequence[tuple[int, str]], hint: bool) -> list[Message]:
    """The prompt for a question with pages as text: numbers and texts in the order of the document."""
    parts = [f"Page {number}: {escape_places(text)}" for number, text in pages]
    if hint:
        parts.append(POSITION_HINT[is_chinese(question)])
    content = "\n".join([*parts, f"Question: {escape_places(question)}"])
    return [{"role": "system", "content": READER}, {"role": "user", "content": content}]


POSITION_HINT = {
    True: "提示：部件的位置指其引线末端所指的结构的位置，而不是编号印在纸上的位置。",
    False: "Note: a part is where its leader line ends, not where its number is printed.",
}
_ROLE = {
    True: "你是熟悉专利文件和附图的专家，请根据给出的专利页面回答问题。",
    False: "You know patents and their drawings well. Answer the question from the patent's pages.",
}
_PAGE = {True: "问题所指的页面：", False: "The page that the question is about:"}
_NAMED_PAGES = {True: "问题所指的各页：", False: "The pages that the question is about:"}
_OTHERS = {True: "同一专利的其他相关页面：", False: "Other pages of the same patent:"}
_PAGES = {True: "同一专利的相关页面：", False: "Pages of the patent:"}
_QUESTION = {True: "问题：【{}】", False: "Question: [{}]"}
_CARE = {True: "请先仔细看图和文字，再给出答案。", False: "Look closely at drawings and text, then give the answer."}


def picture_prompt(question: str, named: int, others: int, hint: bool) -> list[Message]:
    """The prompt for a question with pictures of pages: first the `named` pages that the question names, then
    `others` further pages."""
    chinese = is_chinese(question)
    parts = [_ROLE[chinese]]
    if named:
        parts.append((_PAGE if named == 1 else _NAMED_PAGES)[chinese] + PLACE * named)
    if others:
        parts.append((_OTHERS if named else _PAGES)[chinese] + PLACE * others)
    if hint:
        parts.append(POSITION_HINT[chinese])
    parts += [_QUESTION[chinese].format(escape_places(question)), _CARE[chinese]]
    return _user_message("\n".join(parts))


# -- is the drawing enough ---------------------------------------------------------------------------------------

_CLASSIFY = {
    True: (
        "判断下面关于专利某一页附图的问题，只看这一页的图能否回答。\n"
        "如果问的是部件之间的位置关系（上下、左右、内外、相邻等），只看图就能回答，输出 Y。\n"
        "如果需要知道部件的名称、功能、材料或工作过程，必须再看说明书的文字，输出 N。\n"
        "只输出一个字母。\n\n"
        "问题：在第5页的图中，部件12相对于部件9的位置关系是？\n答：Y\n"
        "问题：在第8页的图中，部件3的名称是什么？\n答：N\n"
        "问题：第4页图2中的部件21起什么作用？\n答：N\n"
        "问题：{}\n答："
    ),
    False: (
        "Here is a question about the drawing on a page of a patent. Can it be answered from that drawing alone?\n"
        "If it asks where parts are in relation to each other (above, left of, inside, next to), the drawing is enough:"
        " write Y.\n"
        "If it asks for a part's name, function, material or way of working, the text is needed too: write N.\n"
        "Write one letter only.\n\n"
        "Question: In the drawing on page 5, where is part 12 in relation to part 9?\nAnswer: Y\n"
        "Question: In the drawing on page 8, what is part 3 called?\nAnswer: N\n"
        "Question: What does part 21 in figure 2 on page 4 do?\nAnswer: N\n"
        "Question: {}\nAnswer:"
    ),
}


def classification_prompt(question: str) -> list[Message]:
    """The prompt that asks whether a page's drawing alone answers a question: Y or N."""
    return _user_message(_CLASSIFY[is_chinese(question)].format(escape_places(question)))


def says_yes(text: str) -> bool:
    """Whether the classifier's completion says yes. The first whole word that means yes or no decides, in English (Y,
    N, yes, no) or Chinese (是, 否, 不是); False if there is none."""
    text = unicodedata.normalize("NFKC", text).lower()
    word = r"(?<![a-z])(?:y|yes|n|no)(?![a-z])|(?<![\u4e00-\u9fff])(?:是的?|否|不是?)(?![\u4e00-\u9fff])"
    found = re.search(word, text)
    return found is not None and found.group().startswith(("y", "是"))


# -- the answer in the style of the data -------------------------------------------------------------------------

_REFINE = {
    True: (
        "你是内容提取专家。请把较长的回答压缩成简短的最终答案：意思不变，大约二十个字以内，不加解释。\n\n"
        "问题：部件3相对于部件5的位置关系是？\n回答：从图中可以看到，部件3位于部件5的正上方，两者相互接触。\n"
        "最终答案：在部件5的上方\n\n"
        "问题：部件7的名称是什么？\n回答：根据说明书第3页的记载，附图标记7表示弹簧座。\n最终答案：弹簧座\n\n"
        "问题：壳体由什么材料制成？\n回答：说明书提到，壳体优选采用铝合金压铸而成，也可以采用工程塑料。\n"
        "最终答案：铝合金或工程塑料\n\n"
        "问题：部件4有几个？\n回答：图中一共画出了四个部件4，均匀分布在圆周上。\n最终答案：四个\n\n"
        "问题：阀门由什么控制？\n回答：阀门的开闭由控制器根据压力传感器的信号来控制。\n最终答案：控制器\n\n"
    ),
    False: (
        "Shorten the long answer to the final one: the same meaning in about ten words at most, and no explanation.\n\n"
        "Question: Where is part 3 in relation to part 5?\n"
        "Answer: In the drawing, part 3 can be seen right above part 5, and both touch.\nFinal answer: above part 5\n\n"
        "Question: What is part 7 called?\n"
        "Answer: As page 3 of the description says, numeral 7 denotes a spring seat.\nFinal answer: spring seat\n\n"
        "Question: What is the housing made of?\n"
        "Answer: The description prefers die-cast aluminium for the housing, but also allows plastics.\n"
        "Final answer: aluminium or plastics\n\n"
        "Question: How many parts 4 are there?\n"
        "Answer: The drawing shows four parts 4, evenly spaced around the circle.\nFinal answer: four\n\n"
        "Question: What controls the valve?\n"
        "Answer: The controller opens and closes the valve by the signal of the pressure sensor.\n"
        "Final answer: the controller\n\n"
    ),
}
_STYLE = {True: "回答风格示例：\n{}\n\n", False: "Final answers in the style that is wanted:\n{}\n\n"}
_LAST = {
    True: "问题：{}\n回答：{}\n最终答案：",
    False: "Question: {}\nAnswer: {}\nFinal answer:",
}


def refinement_prompt(question: str, answer: str, examples: Sequence[str]) -> list[Message]:
    """The prompt to shorten an answer to the style of `examples`, which are answers in the training data."""
    chinese = is_chinese(question)
    style = _STYLE[chinese].format("\n".join(map(escape_places, examples))) if examples else ""
    return _user_message(
        _REFINE[chinese] + style + _LAST[chinese].format(escape_places(question), escape_places(answer))
    )
