"""Renders a conversation with the chat template of a model: Jinja, as transformers renders it, in a sandbox."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from efftrain.errors import ConfigError, ModelFileError

_LONGEST_TEMPLATE = 200_000  # characters; the longest in use have some 20,000


class _RefusedMessagesError(Exception):
    """The template called ``raise_exception``."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str | None = None,
    eos: str | None = None,
    add_generation_prompt: bool,
    answer_marks: tuple[str, str] = ("", ""),
) -> str:
    """Writes a conversation as the text that a model was trained on.

    The text has its markers, the one of ``bos`` too if the template writes it: encode it without adding any.

    Args:
      template: the Jinja template, for example ``GgufTokenizer.chat_template``.
      messages: the turns, each with ``role``, ``content`` and what else the template reads, of JSON types.
      bos: the text of the token before a conversation, which templates know as ``bos_token``; None: there is none.
      eos: the text of the token after an answer, ``eos_token``; None: there is none.
      add_generation_prompt: end with the marker after which the model answers.
      answer_marks: texts that are written before and after what the template has in the tag ``generation``, by which
        some templates say what is an answer.

    Returns:
      The text.

    Raises:
      ConfigError: the template refuses the messages, for example because the roles do not alternate.
      ModelFileError: the template is broken, asks for what a template may not have, or does not end.
    """
    from efftrain.interop.template_limits import BUDGET, Budget

    tokens = {"bos_token": bos, "eos_token": eos}
    values: dict[str, Any] = {name: token for name, token in tokens.items() if token is not None}
    values["messages"] = [_plain(message) for message in messages]
    if len(template) > _LONGEST_TEMPLATE:
        raise _broken(f"it has more than {_LONGEST_TEMPLATE} characters")
    try:
        budget = Budget(template, values)
        pieces = []
        n_chars = 0
        for piece in _compiled(template, answer_marks).generate(
            **values,
            **{BUDGET: budget},
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.now().strftime(form),
        ):
            n_chars += len(piece)
            budget.check_length(n_chars)
            pieces.append(piece)
        return "".join(pieces)
    except _RefusedMessagesError as error:
        raise ConfigError(f"the chat template refuses the messages: {error}; change them") from error
    except Exception as error:  # a template can raise whatever Python's operators and methods raise
        raise _broken(" ".join(str(error).split()).rstrip(".") or type(error).__name__) from error


def _broken(reason: str) -> ModelFileError:
    return ModelFileError(f"the chat template cannot be rendered: {reason}; use another template, or correct it")


@lru_cache(maxsize=16)
def _compiled(template: str, answer_marks: tuple[str, str]) -> Any:
    from efftrain.interop.template_limits import LimitedEnvironment

    environment = LimitedEnvironment(answer_marks)
    return environment.from_string(environment.limited(template))


def _refuse(message: Any) -> None:
    raise _RefusedMessagesError(str(message).rstrip(".!"))


def _plain(value: Any) -> Any:
    """Returns a copy in plain JSON types: what else there is could have methods that the sandbox does not know."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    raise ConfigError(f"messages has a value of the type {type(value).__name__}; give texts, numbers, lists and dicts")
