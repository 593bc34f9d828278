"""The prompt, the same in training and inference: Chinese for a Chinese question, else English."""

from stages.contract.records import Message, escape_places
from stages.tasks.common.wording import is_chinese

_FROM_CONTEXT = {
    True: "用上下文中的原文回答问题，越短越好，只写答案。",
    False: "Answer with the shortest exact words from the context.",
}
_ALONE = {True: "回答问题，越短越好，只写答案。", False: "Answer in as few words as possible."}
_CONTEXT = {True: "上下文：{}\n\n", False: "Context: {}\n\n"}
_QUESTION = {True: "问题：{}", False: "Question: {}"}


def answer_prompt(context: str, question: str) -> list[Message]:
    """The prompt for a question with its context, which is never cut. An empty context is not mentioned.

    The instruction is the system message, because chat templates insert a default one if it is missing.
    """
    chinese = is_chinese(question)
    asked = _QUESTION[chinese].format(escape_places(question))
    if not context:
        return [{"role": "system", "content": _ALONE[chinese]}, {"role": "user", "content": asked}]
    content = _CONTEXT[chinese].format(escape_places(context)) + asked
    return [{"role": "system", "content": _FROM_CONTEXT[chinese]}, {"role": "user", "content": content}]
