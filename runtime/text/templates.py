"""How a chat is spelled: what stands around the questions and answers of each published model.

    template         of            a question, and its answer; system sentence aside
    Hermes-2         V1-2          <|im_start|>user ⏎ Q <|im_end|><|im_start|>assistant ⏎ A
    internlm2-chat   V1-5          the same
    internvl2_5      2.5           the same, a line break after every <|im_end|>
    internvl-hf      *-hf          the same, without a system sentence of its own
    phi3-chat        Mini 4B       <|user|> ⏎ Q <|end|><|assistant|> ⏎ A
    internvl_zh      V1-1          <human>: Q <bot>: A</s>
    vicuna_v1        V1.0          USER: Q ASSISTANT: A</s>

Sources: docs/model.md, section 8.3; the system sentences are those of the published models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internvl_edge.errors import UsageError, did_you_mean

__all__ = [
    "NATIVE",
    "TEMPLATES",
    "THINKING",
    "Piece",
    "Template",
    "Turn",
    "conversation",
    "find_template",
]

NATIVE = "internvl-hf"  # of the layout that transformers' own classes read

CHINESE_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
CHINESE_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
# Of InternVL3.5: the system sentence that makes a model think before it answers.
THINKING = """\
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential \
solutions, and reason through the problem step-by-step. Enclose this entire thinking process \
within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. \
Separate the answer from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer \
should be standalone and not reference the thinking section."""
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The text around the turns of a conversation.

    The prompt is ``start``, the system sentence, ``after_system``, and for every turn ``user``, the
    question, ``after_user``, ``assistant``, ``before_answer``, the answer, ``after_assistant``; it
    ends after the last ``assistant``.
    """

    name: str
    start: str = ""
    system: str | None = ""  # None: a conversation begins with the first question
    after_system: str = ""
    user: str
    after_user: str
    assistant: str
    before_answer: str = ""  # where there is one
    after_assistant: str
    stop: str  # the token that ends an answer
    image_start: str = "<img>"  # around the places of an image's tokens
    image_end: str = "</img>"


def _chatml(name: str, system: str | None = CHINESE_SYSTEM, end: str = "<|im_end|>") -> Template:
    return Template(
        name=name,
        start="<|im_start|>system\n",
        system=system,
        after_system=end,
        user="<|im_start|>user\n",
        after_user=end,
        assistant="<|im_start|>assistant\n",
        after_assistant=end,
        stop="<|im_end|>",
    )


TEMPLATES = {
    template.name: template
    for template in (
        _chatml("Hermes-2"),
        _chatml("internlm2-chat"),
        _chatml("internvl2_5", CHINESE_SYSTEM_2_5, "<|im_end|>\n"),
        _chatml(NATIVE, None, "<|im_end|>\n"),
        Template(
            name="phi3-chat",
            start="<|system|>\n",
            system=CHINESE_SYSTEM,
            after_system="<|end|>",
            user="<|user|>\n",
            after_user="<|end|>",
            assistant="<|assistant|>\n",
            after_assistant="<|end|>",
            stop="<|end|>",
        ),
        Template(
            name="internvl_zh",
            after_system=" ",
            user="<human>: ",
            after_user=" ",
            assistant="<bot>:",
            before_answer=" ",
            after_assistant="</s>",
            stop="</s>",
        ),
        Template(
            name="vicuna_v1",
            system=VICUNA_SYSTEM,
            after_system=" ",
            user="USER: ",
            after_user=" ",
            assistant="ASSISTANT:",
            before_answer=" ",
            after_assistant="</s>",
            stop="</s>",
            image_start="",
            image_end="",
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question, and its answer once there is one.

    A thought is what the model wrote before the answer. It is no part of the prompts to come unless
    a turn has it.
    """

    question: str
    answer: str | None = None
    thought: str | None = None

    @property
    def spelled_answer(self) -> str | None:
        """The answer as a prompt has it."""
        if self.thought is None:
            return self.answer
        return f"<think>\n{self.thought}\n</think>\n\n{self.answer or ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a prompt; in what the template wrote, special tokens are what they look like."""

    text: str
    is_template: bool
    has_images: bool = False  # where ``<image>`` is the place of one: in questions
    has_thoughts: bool = False  # where <think> is a token: in answers and system sentences


def find_template(name: str) -> Template:
    """Find the template of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in TEMPLATES:
        raise UsageError(
            f"template {name!r}: expected one of {', '.join(TEMPLATES)}"
            f"{did_you_mean(name, TEMPLATES)}"
        )
    return TEMPLATES[name]


def conversation(
    template: Template, turns: Sequence[Turn], system: str | None = None
) -> list[Piece]:
    """Spell a conversation as it is put to the model; its last turn has no answer yet.

    Args:
        template: how it is spelled.
        turns: at least one.
        system: instead of the template's own sentence.
    """
    sentence = template.system if system is None else system
    pieces = []
    if sentence or (sentence is not None and template.system is not None):
        pieces += [
            Piece(text=template.start, is_template=True),
            Piece(text=sentence, is_template=system is None, has_thoughts=True),
            Piece(text=template.after_system, is_template=True),
        ]
    for turn in turns:
        # What is empty is written like what is yet to come: without an end.
        pieces += [
            Piece(text=template.user, is_template=True),
            Piece(text=turn.question, is_template=False, has_images=True),
            Piece(text=template.after_user if turn.question else "", is_template=True),
            Piece(text=template.assistant, is_template=True),
        ]
        if answer := turn.spelled_answer:
            pieces += [
                Piece(text=template.before_answer + answer, is_template=False, has_thoughts=True),
                Piece(text=template.after_assistant, is_template=True),
            ]
    return [piece for piece in pieces if piece.text]
