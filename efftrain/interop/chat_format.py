"""Writes conversations with a chat template and marks the answers in them, on which fine-tuning takes its loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efftrain.errors import ConfigError
from efftrain.interop.chat_template import render
from efftrain.interop.marked_text import BEGIN, END, broken

ASSISTANT = "assistant"  # the role whose messages are answers
Message = Mapping[str, Any]  # role, content and what else a template reads
_OWN_PLACE = (
    "so that its answer has no place of its own; end conversations after their first answer, or mark answers in the "
    "template with the tag generation"
)


@dataclass(frozen=True)
class ChatFormat:
    """How the conversations of a model are written. The texts are for ``MarkedEncoder``.

    Attributes:
      template: the Jinja template.
      bos: the text of the token before a conversation, which templates know as ``bos_token``. None: there is none.
      eos: the text of the token after an answer, ``eos_token``. None: there is none.
      special: the texts of all special tokens. Where a message spells one, it is broken apart.
      ends: the texts of the tokens of which each ends an answer.
    """

    template: str
    bos: str | None
    eos: str | None
    special: tuple[str, ...]
    ends: tuple[str, ...]

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Writes a conversation; see ``chat_template.render`` for the argument and the errors.

        Raises:
          ConfigError: also if a message has a reserved character.
        """
        return self._render(broken(messages, self.special), prompt=add_generation_prompt)

    def answers(self, messages: Sequence[Message]) -> str:
        """Writes a whole conversation, with its answers between ``BEGIN`` and ``END``.

        Where the template has the tag ``generation``, answers are what it has in it, as in transformers. Otherwise an
        answer is what a message of the assistant adds to the conversation before it with its generation prompt, up to
        the first token that ends an answer: exactly what the model has to write, and after which it is to stop.

        Raises:
          ConfigError: there is no answer, nothing ends it, or the template changes what it has written when more
            messages follow, so that no answer has a place of its own; see also ``text``.
          ModelFileError: the template cannot be rendered.
        """
        answers = [i for i, message in enumerate(messages) if message.get("role") == ASSISTANT]
        if not answers:
            raise ConfigError(
                f"no message has the role {ASSISTANT}, so that there is nothing to learn; remove the conversation"
            )
        messages = broken(messages, self.special)
        whole = self._render(messages, marks=(BEGIN, END))
        if BEGIN in whole:
            return whole
        pieces, written = [], 0
        for start, stop in self._spans(messages, whole, answers):
            pieces += [whole[written:start], BEGIN, whole[start:stop], END]
            written = stop
        return "".join([*pieces, whole[written:]])

    def _spans(self, messages: Sequence[Message], whole: str, answers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yields the first character of each answer and the one after its last, from the first messages alone."""
        for i in answers:
            if i == 0:
                raise ConfigError("the first message is an answer; begin a conversation with what is answered")
            asked = self._render(messages[:i], prompt=True)
            answered = self._render(messages[: i + 1])
            if not answered.startswith(asked):
                raise ConfigError(
                    f"the chat template writes another prompt before message {i + 1} than without it, {_OWN_PLACE}"
                )
            if not whole.startswith(answered):
                raise ConfigError(f"the chat template changes message {i + 1} when more messages follow, {_OWN_PLACE}")
            stops = [at + len(end) for end in self.ends if (at := answered.find(end, len(asked))) >= 0]
            if not stops:
                raise ConfigError(
                    f"the chat template ends the answer in message {i + 1} with none of the tokens "
                    f"{', '.join(self.ends)}, so that a model would not learn to stop; add the id of its marker to "
                    "eos_token_id in generation_config.json of the run"
                )
            yield len(asked), min(stops)

    def _render(self, messages: Sequence[Message], *, prompt: bool = False, marks: tuple[str, str] = ("", "")) -> str:
        return render(
            self.template, messages, bos=self.bos, eos=self.eos, add_generation_prompt=prompt, answer_marks=marks
        )
