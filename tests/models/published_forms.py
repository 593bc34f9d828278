"""Chat templates of the published models' forms, each with the same rendering written a second time, in Python.

Both are written for these tests. A form is what its docstring says: which words mark turns, where tools, tool calls,
results and thoughts stand, and what is stripped or left out.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.models.chat_models import NO_SYSTEM, Kind


class C(str):
    """A control word, as the template writes it."""


Pieces = list[str]
"""A text in pieces: those of type C are control words, the others plain text."""


@dataclass(frozen=True)
class Form:
    """A published form of chat template."""

    kind: Kind
    prompt: Callable[[list[dict[str, Any]], list[dict[str, Any]]], Pieces]
    """What a model gets for messages and tools, written in Python."""
    answer: Callable[[dict[str, Any]], Pieces]
    """What it has to write for an answer, with its end token."""
    tools: bool = True
    """Whether it has tools."""
    thoughts: bool = False
    """Whether it has thoughts."""
    calls: int = 2
    """Most tool calls of an answer; 0: none."""
    text_with_call: bool = True
    """Whether it writes the text of an answer that also calls tools."""
    strips: bool = False
    """Whether it strips contents of white space."""


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def function_of(call: dict[str, Any]) -> tuple[str, Any]:
    return call["function"]["name"], call["function"]["arguments"]


def tagged(text: str, *words: str) -> Pieces:
    """A text with these words as control words."""
    for word in words:
        if word in text:
            before, _, after = text.partition(word)
            return [*tagged(before, *words), C(word), *tagged(after, *words)]
    return [text]


# -- ChatML: Qwen2.5, Qwen3, InternLM2, SmolLM3, Phi-4 ---------------------------------------------------------------


def turn(role: str, *body: str) -> Pieces:
    return [C("<|im_start|>"), f"{role}\n", *body, C("<|im_end|>"), "\n"]


BEGIN = [C("<|im_start|>"), "assistant\n"]

RESULTS = (
    "{%- elif m.role == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
)
CALLS = (
    "{%- for call in m.tool_calls -%}{%- if call.function -%}{%- set call = call.function -%}{%- endif -%}"
    "{%- if not loop.first or said -%}{{- '\n' -}}{%- endif -%}"
    '{{- \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' + (call.arguments | tojson) + '
    "'}\n</tool_call>' -}}{%- endfor -%}"
)


def chatml_calls(message: dict[str, Any], thought: Pieces | None = None) -> Pieces:
    """The text of an answer and its calls; `thought` is what the text begins with."""
    pieces: Pieces = [*(thought or []), *([message["content"]] if message.get("content") else [])]
    for call in message.get("tool_calls", []):
        name, arguments = function_of(call)
        pieces += ["\n"] if pieces else []
        body = f'\n{{"name": "{name}", "arguments": {as_json(arguments)}}}\n'
        pieces += [C("<tool_call>"), body, C("</tool_call>")]
    return pieces


def chatml_results(messages: list[dict[str, Any]], place: int, *tags: type) -> Pieces:
    """A tool message; `tags` is the type of the words around a result."""
    (kind,) = tags
    first = messages[place - 1]["role"] != "tool"
    last = place + 1 == len(messages) or messages[place + 1]["role"] != "tool"
    body = ["\n", kind("<tool_response>"), f"\n{messages[place]['content']}\n", kind("</tool_response>")]
    return [
        *([C("<|im_start|>"), "user"] if first else []),
        *body,
        *([C("<|im_end|>"), "\n"] if last else []),
    ]


QWEN25 = Kind(
    "{%- if messages[0].role == 'system' -%}{%- set head = messages[0].content -%}"
    "{%- else -%}{%- set head = 'You help.' -%}{%- endif -%}{{- '<|im_start|>system\n' + head -}}"
    "{%- if tools -%}{{- '\n\n# Tools\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}{{- '\n</tools>' -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- for m in messages -%}{%- set said = m.content -%}"
    "{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + said + '<|im_end|>\n' -}}"
    "{%- elif m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if said -%}{{- said -}}{%- endif -%}" + CALLS + "{{- '<|im_end|>\n' -}}" + RESULTS + "{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
    (),
    "<|im_end|>",
    tags=("<tool_call>", "</tool_call>"),
)
"""As Qwen2.5: tools in the system message, results as a user's turn, several in one."""


def qwen25_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    head = messages[0]["content"] if messages[0]["role"] == "system" else "You help."
    if tools:
        head += "\n\n# Tools\n<tools>" + "".join(f"\n{as_json(tool)}" for tool in tools) + "\n</tools>"
    pieces = turn("system", head)
    for place, message in enumerate(messages):
        if message["role"] == "user":
            pieces += turn("user", message["content"])
        elif message["role"] == "assistant":
            pieces += turn("assistant", *chatml_calls(message))
        elif message["role"] == "tool":
            pieces += chatml_results(messages, place, str)
    return pieces + BEGIN


def chatml_answer(message: dict[str, Any]) -> Pieces:
    return [*chatml_calls(message), C("<|im_end|>")]


QWEN3 = Kind(
    "{%- if messages[0].role == 'system' or tools -%}{{- '<|im_start|>system\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}"
    "{%- if tools -%}{{- '# Tools' -}}"
    "{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}"
    "{%- for m in messages -%}{%- set said = m.content if m.content is string else '' -%}"
    "{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + said + '<|im_end|>\n' -}}"
    "{%- elif m.role == 'assistant' -%}{%- set thought = '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}"
    "{%- elif '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- said -}}" + CALLS + "{{- '<|im_end|>\n' -}}" + RESULTS + "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}",
    (),
    "<|im_end|>",
    tags=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
"""As Qwen3: thinks, and leaves out the thoughts before the last user's turn, but not those between tool calls."""


def thought_of(message: dict[str, Any]) -> Pieces:
    return [C("<think>"), f"\n{message.get('reasoning_content', '')}\n", C("</think>"), "\n\n"]


def qwen3_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    head = f"{messages[0]['content']}\n\n" if messages[0]["role"] == "system" else ""
    head += "# Tools" + "".join(f"\n{as_json(tool)}" for tool in tools) if tools else ""
    pieces = turn("system", head) if head else []
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    for place, message in enumerate(messages):
        if message["role"] == "user":
            pieces += turn("user", message["content"])
        elif message["role"] == "assistant":
            thought = thought_of(message) if place > last and message.get("reasoning_content") else []
            pieces += turn("assistant", *thought, *chatml_calls(message))
        elif message["role"] == "tool":
            pieces += chatml_results(messages, place, C)
    return pieces + BEGIN


def qwen3_answer(message: dict[str, Any]) -> Pieces:
    return [*thought_of(message), *chatml_calls(message), C("<|im_end|>")]


SMOLLM3 = Kind(
    "{%- set mode = '/no_think' if enable_thinking is defined and enable_thinking is false else '/think' -%}"
    "{%- set head = messages[0].content.rstrip() if messages[0].role == 'system' else 'You help.' -%}"
    "{{- '<|im_start|>system\n## Mode: ' + mode + '\n\n' + head + '\n\n' -}}"
    "{%- if tools -%}{{- '### Tools\n<tools>\n' -}}"
    "{%- for tool in tools -%}{{- (tool | string) + '\n' -}}{%- endfor -%}{{- '</tools>\n\n' -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- for m in messages -%}{%- set said = m.content if m.content is string else '' -%}"
    "{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + said + '<|im_end|>\n' -}}"
    "{%- elif m.role == 'assistant' -%}{% generation %}"
    "{{- '<|im_start|>assistant\n' -}}{%- if mode == '/no_think' -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- said.lstrip('\n') -}}" + CALLS + "{{- '<|im_end|>\n' -}}{% endgeneration %}"
    "{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\n' + said + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if mode == '/no_think' -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}",
    (),
    "<|im_end|>",
    tags=("<think>", "</think>", "<tool_call>", "</tool_call>"),
)
"""As SmolLM3: its mode in the system message, tools as Python writes them, results as a user's turn, and earlier
thoughts stay."""


def smollm3_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    head = messages[0]["content"].rstrip() if messages[0]["role"] == "system" else "You help."
    head = f"## Mode: /think\n\n{head}\n\n"
    head += "### Tools\n<tools>\n" + "".join(f"{tool}\n" for tool in tools) + "</tools>\n\n" if tools else ""
    pieces = turn("system", head)
    for message in messages:
        if message["role"] in ("user", "tool"):
            pieces += turn("user", message["content"])
        elif message["role"] == "assistant":
            pieces += turn("assistant", *smollm3_answer(message)[:-1])
    return pieces + BEGIN


def smollm3_answer(message: dict[str, Any]) -> Pieces:
    thought = thought_of(message) if message.get("reasoning_content") else []
    return [*chatml_calls(message, thought), C("<|im_end|>")]


INTERNLM2 = Kind(
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<s>", "</s>"),
    "</s>",
    ("<|im_end|>",),
)
"""As InternLM2: ChatML after a first token, and the generation config names the end of a turn."""


def internlm2_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    turns = (piece for message in messages for piece in turn(message["role"], message["content"]))
    return [C("<s>"), *turns, *BEGIN]


PHI4 = Kind(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ("<|im_sep|>",),
    "<|im_end|>",
)
"""As Phi-4: a control word between role and text, and nothing between turns."""


def phi4_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        pieces += [C("<|im_start|>"), message["role"], C("<|im_sep|>"), message["content"], C("<|im_end|>")]
    return [*pieces, C("<|im_start|>"), "assistant", C("<|im_sep|>")]


# -- others ----------------------------------------------------------------------------------------------------------

LLAMA31 = Kind(
    "{{- bos_token -}}{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{- '<|head|>system<|tail|>\n\n' -}}{%- if tools -%}{{- 'Environment: ipython\n' -}}{%- endif -%}"
    "{{- 'Today: ' + date + '\n\n' + system + '<|eot|>' -}}"
    "{%- if tools -%}{%- set first = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}"
    "{{- '<|head|>user<|tail|>\n\nCall one of these.\n\n' -}}"
    "{%- for tool in tools -%}{{- (tool | tojson(indent=4)) + '\n\n' -}}{%- endfor -%}"
    "{{- first + '<|eot|>' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if not (m.role == 'tool' or 'tool_calls' in m) -%}"
    "{{- '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim + '<|eot|>' -}}"
    "{%- elif 'tool_calls' in m -%}{%- if m.tool_calls | length != 1 -%}"
    "{{- raise_exception('Only one tool call at once') -}}{%- endif -%}"
    "{%- set call = m.tool_calls[0].function -%}"
    '{{- \'<|head|>assistant<|tail|>\n\n{"name": "\' + call.name + \'", "parameters": \' -}}'
    "{{- (call.arguments | tojson) + '}<|eot|>' -}}"
    "{%- else -%}{{- '<|head|>ipython<|tail|>\n\n' -}}"
    "{%- if m.content is mapping or m.content is iterable -%}{{- m.content | tojson -}}"
    "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|eot|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|head|>assistant<|tail|>\n\n' -}}{%- endif -%}",
    ("<|begin|>", "<|head|>", "<|tail|>", "<|eot|>", "<|eos|>"),
    "<|eos|>",
    ("<|eot|>",),
)
"""As Llama 3.1: strips contents, writes a date, tools in the first user's message, results as JSON texts, and one call
at most, without the text beside it."""


def llama_turn(role: str, text: str) -> Pieces:
    return [C("<|head|>"), role, C("<|tail|>"), f"\n\n{text}", C("<|eot|>")]


def llama_call(message: dict[str, Any]) -> str:
    name, arguments = function_of(message["tool_calls"][0])
    return f'{{"name": "{name}", "parameters": {as_json(arguments)}}}'


def llama31_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip(), messages[1:]
    environment = "Environment: ipython\n" if tools else ""
    pieces = [C("<|begin|>"), *llama_turn("system", f"{environment}Today: 03 Feb 2026\n\n{system}")]
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            pieces += llama_turn("ipython", as_json(message["content"]))
        elif message.get("tool_calls"):
            pieces += llama_turn("assistant", llama_call(message))
        else:
            written = [json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools]
            head = "Call one of these.\n\n" + "".join(written) if tools and not place else ""
            pieces += llama_turn(message["role"], head + message["content"].strip())
    return [*pieces, C("<|head|>"), "assistant", C("<|tail|>"), "\n\n"]


def llama31_answer(message: dict[str, Any]) -> Pieces:
    return [llama_call(message) if message.get("tool_calls") else message["content"].strip(), C("<|eot|>")]


GEMMA = NO_SYSTEM
"""As Gemma: no system role, no tools, strips contents."""


def gemma_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [C("<|begin|>")]
    system = ""
    for message in messages:
        if message["role"] == "system":
            system = f"{message['content']}\n\n"
            continue
        role = {"user": "user", "assistant": "model"}[message["role"]]
        text = ((system if role == "user" else "") + message["content"]).strip()
        system = "" if role == "user" else system
        pieces += [C("<start_of_turn>"), f"{role}\n{text}", C("<end_of_turn>"), "\n"]
    return [*pieces, C("<start_of_turn>"), "model\n"]


def gemma_answer(message: dict[str, Any]) -> Pieces:
    return [message["content"].strip(), C("<end_of_turn>")]


MISTRAL3 = Kind(
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}"
    "{%- endif -%}{{- bos_token -}}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if tools and m == asked[-1] -%}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' -}}"
    "{%- elif m.tool_calls -%}{{- '[TOOL_CALLS] [' -}}"
    "{%- for call in m.tool_calls -%}"
    "{%- if call.id is not defined or call.id | length != 9 -%}"
    "{{- raise_exception('Ids have length 9!') -}}{%- endif -%}"
    "{%- set out = call.function | tojson -%}{{- out[:-1] + ', \"id\": \"' + call.id + '\"}' -}}"
    "{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}{{- ']' + eos_token -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if m.tool_call_id | length != 9 -%}{{- raise_exception('Ids have length 9!') -}}{%- endif -%}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + m.content | string + ', \"call_id\": \"' + m.tool_call_id + '\"}' -}}"
    "{{- '[/TOOL_RESULTS]' -}}{%- endif -%}{%- endfor -%}",
    (
        *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "</s>",
)
"""As Mistral v3: tools before the last user's message, the system message in the last message, ids of nine characters,
no generation prompt, and no text beside a call."""


def mistral3_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    system = None
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    pieces: Pieces = [C("<s>")]
    for place, message in enumerate(messages):
        if message["role"] == "user":
            if tools and place == last:
                pieces += [C("[AVAILABLE_TOOLS]"), f" {as_json(tools)}", C("[/AVAILABLE_TOOLS]")]
            head = f"{system}\n\n" if system is not None and place + 1 == len(messages) else ""
            pieces += [C("[INST]"), f" {head}{message['content']}", C("[/INST]")]
        elif message["role"] == "assistant":
            pieces += mistral3_answer(message)
        else:
            result = f' {{"content": {message["content"]}, "call_id": "{message["tool_call_id"]}"}}'
            pieces += [C("[TOOL_RESULTS]"), result, C("[/TOOL_RESULTS]")]
    return pieces


def mistral3_answer(message: dict[str, Any]) -> Pieces:
    if not message.get("tool_calls"):
        return [f" {message['content']}", C("</s>")]
    calls = [{**call["function"], "id": call["id"]} for call in message["tool_calls"]]
    return [C("[TOOL_CALLS]"), f" {as_json(calls)}", C("</s>")]


GLM4 = Kind(
    "[gMASK]<sop>{%- if tools -%}{{- '<|system|>\n# Tools' -}}{%- for tool in tools -%}"
    "{{- '\n\n## ' + tool.function.name + '\n\n' + (tool.function | tojson(indent=4)) -}}{%- endfor -%}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' -%}{{- '<|observation|>\n' + m.content -}}"
    "{%- elif m.role == 'assistant' and m.tool_calls -%}"
    "{%- if m.content -%}{{- '<|assistant|>\n' + m.content -}}{%- endif -%}"
    "{%- for call in m.tool_calls -%}"
    "{{- '<|assistant|>' + call.function.name + '\n' + (call.function.arguments | tojson) -}}{%- endfor -%}"
    "{%- else -%}{{- '<|' + m.role + '|>\n' + m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}",
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "<|endoftext|>",
    ("<|user|>", "<|observation|>"),
)
"""As GLM-4: the words that begin the next turn end an answer."""


def glm4_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [C("[gMASK]"), C("<sop>")]
    if tools:
        written = [
            (one["function"]["name"], json.dumps(one["function"], ensure_ascii=False, indent=4)) for one in tools
        ]
        pieces += [C("<|system|>"), "\n# Tools" + "".join(f"\n\n## {name}\n\n{text}" for name, text in written)]
    for message in messages:
        if message["role"] == "tool":
            pieces += [C("<|observation|>"), f"\n{message['content']}"]
        elif message.get("tool_calls"):
            pieces += [C("<|assistant|>"), *glm4_answer(message)[:-1]]
        else:
            pieces += [C(f"<|{message['role']}|>"), f"\n{message['content']}"]
    return [*pieces, C("<|assistant|>")]


def glm4_answer(message: dict[str, Any]) -> Pieces:
    if not message.get("tool_calls"):
        return [f"\n{message['content']}", C("<|user|>")]
    pieces: Pieces = [f"\n{message['content']}", C("<|assistant|>")] if message.get("content") else []
    for call in message["tool_calls"]:
        name, arguments = function_of(call)
        pieces += [f"{name}\n{as_json(arguments)}", C("<|assistant|>")]
    return [*pieces[:-1], C("<|observation|>")]


DEEPSEEK = Kind(
    "{%- set ns = namespace(system='') -%}"
    "{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor -%}"
    "{{- bos_token + ns.system -}}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<|User|>' + m.content -}}"
    "{%- elif m.role == 'assistant' and m.content is none -%}{{- '<|Assistant|><|calls|>' -}}"
    "{%- for call in m.tool_calls -%}"
    "{{- '<|call|>' + call.type + '<|sep|>' + call.function.name + '\n```json\n' + call.function.arguments -}}"
    "{{- '\n```<|call_end|>' -}}{%- endfor -%}{{- '<|calls_end|>' + eos_token -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{{- '<|Assistant|>' + m.content.split('</think>')[-1].lstrip('\n') + eos_token -}}"
    "{%- elif m.role == 'tool' -%}{{- '<|output|>' + m.content + '<|output_end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}",
    (
        *("<|begin|>", "<|User|>", "<|Assistant|>", "<|end_of_text|>", "<|calls|>", "<|calls_end|>", "<|call|>"),
        *("<|call_end|>", "<|sep|>", "<|output|>", "<|output_end|>"),
    ),
    "<|end_of_text|>",
    tags=("<think>", "</think>"),
)
"""As DeepSeek-R1: the prompt begins the thoughts, no finished turn has them, calls need JSON texts and a message
without content, and tools cannot be listed."""


def deepseek_calls(message: dict[str, Any]) -> Pieces:
    pieces: Pieces = [C("<|calls|>")]
    for call in message["tool_calls"]:
        name, arguments = function_of(call)
        body = f"{name}\n```json\n{as_json(arguments)}\n```"
        pieces += [C("<|call|>"), "function", C("<|sep|>"), body, C("<|call_end|>")]
    return [*pieces, C("<|calls_end|>")]


def deepseek_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [C("<|begin|>"), *(one["content"] for one in messages if one["role"] == "system")]
    for message in messages:
        if message["role"] == "user":
            pieces += [C("<|User|>"), message["content"]]
        elif message["role"] == "assistant":
            said = deepseek_calls(message) if message.get("tool_calls") else [message["content"]]
            pieces += [C("<|Assistant|>"), *said, C("<|end_of_text|>")]
        elif message["role"] == "tool":
            pieces += [C("<|output|>"), message["content"], C("<|output_end|>")]
    return [*pieces, C("<|Assistant|>"), C("<think>"), "\n"]


def deepseek_answer(message: dict[str, Any]) -> Pieces:
    said = deepseek_calls(message) if message.get("tool_calls") else [message["content"]]
    thought = message.get("reasoning_content", "")
    return [f"{thought}\n", C("</think>"), "\n\n", *said, C("<|end_of_text|>")]


DEEPSEEK31 = Kind(
    "{%- set thinking = enable_thinking is defined and enable_thinking -%}{%- set ns = namespace(asked=false) -%}"
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- m.content -}}"
    "{%- elif m.role == 'user' -%}{%- set ns.asked = true -%}{{- '<|User|>' + m.content -}}"
    "{%- elif m.role == 'assistant' -%}{%- if ns.asked -%}{{- '<|Assistant|></think>' -}}{%- endif -%}"
    "{%- set ns.asked = false -%}"
    "{%- if m.tool_calls is defined -%}{{- m.content or '' -}}{{- '<|calls|>' -}}{%- for call in m.tool_calls -%}"
    "{{- '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments + '<|call_end|>' -}}{%- endfor -%}"
    "{{- '<|calls_end|>' + eos_token -}}"
    "{%- else -%}{{- (m.content.split('</think>', 1)[1] if '</think>' in m.content else m.content) + eos_token -}}"
    "{%- endif -%}"
    "{%- elif m.role == 'tool' -%}{{- '<|output|>' + m.content + '<|output_end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt and ns.asked -%}{{- '<|Assistant|>' -}}"
    "{%- if thinking -%}{{- '<think>' -}}{%- else -%}{{- '</think>' -}}{%- endif -%}{%- endif -%}",
    DEEPSEEK.words,
    "<|end_of_text|>",
    tags=("<think>", "</think>"),
)
"""As DeepSeek-V3.1: a prompt begins or ends the thoughts after a question, and neither after a result."""


def deepseek31_calls(message: dict[str, Any]) -> Pieces:
    pieces: Pieces = [message.get("content") or "", C("<|calls|>")]
    for call in message["tool_calls"]:
        name, arguments = function_of(call)
        pieces += [C("<|call|>"), name, C("<|sep|>"), as_json(arguments), C("<|call_end|>")]
    return [*pieces, C("<|calls_end|>")]


def deepseek31_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    pieces: Pieces = [C("<|begin|>")]
    for message in messages:
        if message["role"] == "system":
            pieces += [message["content"]]
        elif message["role"] == "user":
            pieces += [C("<|User|>"), message["content"], C("<|Assistant|>"), C("</think>")]
        elif message["role"] == "assistant":
            pieces += deepseek31_answer(message)
        else:
            pieces += [C("<|output|>"), message["content"], C("<|output_end|>")]
    return pieces


def deepseek31_answer(message: dict[str, Any]) -> Pieces:
    said = deepseek31_calls(message) if message.get("tool_calls") else [message["content"]]
    return [*said, C("<|end_of_text|>")]


HARMONY = Kind(
    "{{- '<|start|>system<|message|>You help.\nReasoning: medium<|end|>' -}}"
    "{%- set developer = '' -%}{%- if messages[0].role == 'system' -%}{%- set developer = messages[0].content -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- if developer or tools -%}{{- '<|start|>developer<|message|>' -}}"
    "{%- if developer -%}{{- '# Instructions\n\n' + developer + '\n\n' -}}{%- endif -%}"
    "{%- if tools -%}{{- '# Tools\n\nnamespace functions {\n' -}}{%- for tool in tools -%}"
    "{{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: {' -}}"
    "{%- for name, value in tool.function.parameters.properties.items() -%}{{- ' ' + name + ': ' + value.type -}}"
    "{%- endfor -%}{{- ' }) => any;\n' -}}{%- endfor -%}{{- '}' -}}{%- endif -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- set ns = namespace(call=none) -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and 'tool_calls' in m -%}{%- set call = m.tool_calls[0].function -%}"
    "{%- if m.content and m.thinking -%}{{- raise_exception('Both content and thinking') -}}{%- endif -%}"
    "{%- if m.content or m.thinking -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' -}}"
    "{{- (call.arguments | tojson) + '<|call|>' -}}{%- set ns.call = call.name -%}"
    "{%- elif m.role == 'assistant' -%}"
    "{%- if loop.last and not add_generation_prompt -%}"
    "{%- if 'thinking' in m -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' -}}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' -}}{%- endif -%}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' -}}"
    "{{- (m.content | tojson) + '<|end|>' -}}"
    "{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}",
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    "<|return|>",
    ("<|call|>",),
)
"""As gpt-oss: channels, thoughts under a key of their own and only in the last turn, tools as types, one call at most,
and another end token in finished turns than a model writes."""


def harmony(role: str, channel: str | None, text: str, end: str = "<|end|>") -> Pieces:
    kind: Pieces = [C("<|channel|>"), channel] if channel else []
    return [C("<|start|>"), role, *kind, C("<|message|>"), text, C(end)]


def harmony_call(message: dict[str, Any]) -> Pieces:
    name, arguments = function_of(message["tool_calls"][0])
    thought = message.get("content") or message.get("reasoning_content")
    return [
        *(harmony("assistant", "analysis", thought) if thought else []),
        *harmony(f"assistant to=functions.{name}", "commentary json", as_json(arguments), "<|call|>"),
    ]


def harmony_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    pieces = harmony("system", None, "You help.\nReasoning: medium")
    head, name = "", ""
    if messages[0]["role"] == "system":
        head = f"# Instructions\n\n{messages[0]['content']}\n\n" if messages[0]["content"] else ""
        messages = messages[1:]
    if tools:
        head += "# Tools\n\nnamespace functions {\n"
        for tool in (one["function"] for one in tools):
            fields = "".join(f" {key}: {value['type']}" for key, value in tool["parameters"]["properties"].items())
            head += f"// {tool['description']}\ntype {tool['name']} = (_: {{{fields} }}) => any;\n"
        head += "}"
    pieces += harmony("developer", None, head) if head else []
    for message in messages:
        if message.get("tool_calls"):
            name = message["tool_calls"][0]["function"]["name"]
            pieces += harmony_call(message)
        elif message["role"] == "assistant":
            pieces += harmony("assistant", "final", message["content"])
        elif message["role"] == "tool":
            pieces += harmony(f"functions.{name} to=assistant", "commentary", as_json(message["content"]))
        else:
            pieces += harmony(message["role"], None, message["content"])
    return [*pieces, C("<|start|>"), "assistant"]


def harmony_answer(message: dict[str, Any]) -> Pieces:
    """Without its beginning, which the prompt has."""
    if message.get("tool_calls"):
        _, said, *more = harmony_call(message)
        return [*([said.removeprefix("assistant")] if said != "assistant" else []), *more]
    thought = message.get("reasoning_content")
    pieces = harmony("assistant", "analysis", thought) if thought else []
    return [*pieces, *harmony("assistant", "final", message["content"], "<|return|>")][2:]


COMMAND_R = Kind(
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}"
    "{{ '<|START|><|' + role + '|>' + m.content.strip() + '<|END|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}",
    ("<BOS>", "<|START|>", "<|END|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>"),
    "<|END|>",
)
"""As Command-R: roles are control words, and contents are stripped."""


def command_r_prompt(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Pieces:
    words = {"system": "<|SYSTEM|>", "user": "<|USER|>", "assistant": "<|CHATBOT|>"}
    pieces: Pieces = [C("<BOS>")]
    for message in messages:
        pieces += [C("<|START|>"), C(words[message["role"]]), message["content"].strip(), C("<|END|>")]
    return [*pieces, C("<|START|>"), C("<|CHATBOT|>")]


def plain_answer(end: str, strips: bool = False) -> Callable[[dict[str, Any]], Pieces]:
    def answer(message: dict[str, Any]) -> Pieces:
        return [message["content"].strip() if strips else message["content"], C(end)]

    return answer


FORMS: dict[str, Form] = {
    "qwen2.5": Form(QWEN25, qwen25_prompt, chatml_answer),
    "qwen3": Form(QWEN3, qwen3_prompt, qwen3_answer, thoughts=True),
    "smollm3": Form(SMOLLM3, smollm3_prompt, smollm3_answer, thoughts=True),
    "internlm2": Form(INTERNLM2, internlm2_prompt, plain_answer("<|im_end|>"), tools=False, calls=0),
    "phi-4": Form(PHI4, phi4_prompt, plain_answer("<|im_end|>"), tools=False, calls=0),
    "llama3.1": Form(LLAMA31, llama31_prompt, llama31_answer, calls=1, text_with_call=False, strips=True),
    "gemma": Form(GEMMA, gemma_prompt, gemma_answer, tools=False, calls=0, strips=True),
    "mistral-v3": Form(MISTRAL3, mistral3_prompt, mistral3_answer, text_with_call=False),
    "glm-4": Form(GLM4, glm4_prompt, glm4_answer),
    "deepseek-r1": Form(DEEPSEEK, deepseek_prompt, deepseek_answer, tools=False, thoughts=True, text_with_call=False),
    "deepseek-v3.1": Form(DEEPSEEK31, deepseek31_prompt, deepseek31_answer, tools=False, thoughts=True),
    "gpt-oss": Form(HARMONY, harmony_prompt, harmony_answer, thoughts=True, calls=1),
    "command-r": Form(COMMAND_R, command_r_prompt, plain_answer("<|END|>", True), tools=False, calls=0, strips=True),
}


def merged(pieces: Sequence[str]) -> Pieces:
    """Pieces in which no two plain texts follow each other, and none is empty."""
    found: Pieces = []
    for piece in filter(None, pieces):
        if found and not isinstance(piece, C) and not isinstance(found[-1], C):
            found[-1] += piece
        else:
            found.append(piece)
    return found
