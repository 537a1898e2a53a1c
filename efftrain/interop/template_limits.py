"""A Jinja environment for templates of unknown origin: a sandbox in which they can neither escape nor run for ever.

Jinja's sandbox keeps templates from Python's internals, but not from loops in loops, from ``'a' * 10**10`` or from a
text that doubles sixty times. Here every step of a loop, call and operation, and the size of what it makes, is charged
to a budget, and operations that multiply sizes are checked before they run.
"""

import json
import time
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_indent, do_join, do_replace
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_SECONDS = 10.0
_DEPTH = 64  # of lists in lists
_BITS = 4096  # of a whole number
_PER_STEP = 256  # characters that cost as much as a step of a loop
# Left out: filters that make texts or lists of any length (center, format, batch), that compute powers (round), or that
# look into objects (attr).
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int"),
    *("items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe"),
    *("select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper", "urlencode"),
)
_NOT_OF_TEXTS = frozenset(
    ["center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"]
)
# With a space, so that no template can name them.
BUDGET, _STEP, _MEASURED = " budget", " step", " measured"


class Budget:
    """What a template may do: steps, characters of one text, and seconds, in proportion to what it is given."""

    def __init__(self, template: str, values: Any):
        self._left, self._longest = 10**9, 10**9
        self._deadline = time.monotonic() + _SECONDS
        self._step = 1 + len(template) // _PER_STEP
        n_chars = self.measure(values)
        self._left = 3 * 10**5 + 100 * (10**9 - self._left)
        self._longest = 10**6 + 10 * (n_chars + len(template))

    def step(self) -> None:
        self._spend(self._step)
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {_SECONDS:.0f} seconds")

    def check_length(self, n_chars: float) -> None:
        if n_chars > self._longest:
            raise SecurityError(f"it makes a text or list of more than {self._longest} characters")

    def measure(self, value: Any, depth: int = 0) -> int:
        """Charges a value to the budget and returns how many characters it has when printed, roughly."""
        if depth > _DEPTH:
            raise SecurityError(f"it makes a list with more than {_DEPTH} levels")
        n_chars = 8
        if isinstance(value, str):
            n_chars = len(value)
        elif isinstance(value, dict):
            n_chars += sum(self.measure(key, depth + 1) + self.measure(item, depth + 1) for key, item in value.items())
        elif isinstance(value, list | tuple):
            n_chars += sum(self.measure(item, depth + 1) for item in value)
        elif isinstance(value, int) and value.bit_length() > _BITS:
            raise SecurityError(f"it makes a number of more than {_BITS} bits")
        self._spend(1 + n_chars // _PER_STEP if isinstance(value, str) else 1)
        self.check_length(n_chars)
        return n_chars

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise SecurityError("it does more than a conversation of this length needs")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Templates as transformers renders them, charged to the ``Budget`` that their context has under ``BUDGET``.

    Args:
      answer_marks: texts that are written before and after what the template has in the tag ``generation``.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, answer_marks: tuple[str, str] = ("", "")) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.answer_marks = answer_marks
        self.filters = {name: FILTERS[name] for name in _FILTERS} | {
            "indent": _indent,
            "join": _join,
            "replace": _replace_filter,
            "tojson": _to_json,
            _STEP: _step,
            _MEASURED: _measured,
        }
        self.globals = {"range": self.globals["range"], "dict": _make_dict, "namespace": _Namespace}

    def limited(self, source: str) -> nodes.Template:
        """Parses a template and inserts the charges."""
        tree = self.parse(source)
        _Charges().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float) or (isinstance(obj, str) and attr in _NOT_OF_TEXTS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("it asks for 'format' of a str")

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.step()
        if isinstance(text := getattr(__obj, "__self__", None), str) and args:
            if __obj.__name__ == "join":
                args = (list(args[0]), *args[1:])
                budget.check_length(budget.measure(args[0]) + len(args[0]) * len(text))
            elif __obj.__name__ == "replace":
                _check_replace(budget, text, *args[:2])
        found = super().call(__context, __obj, *args, **kwargs)
        budget.measure(found)
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.step()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            budget.measure(1 << min(max(left.bit_length() * right, 0), 2 * _BITS))
        for times, what in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and isinstance(what, str | list | tuple):
                budget.check_length(times * (1 + budget.measure(what)))
        if operator == "%" and isinstance(left, str):
            _check_format(budget, left, right)
        found = super().call_binop(context, operator, left, right)
        budget.measure(found)
        return found


class _Charges(NodeTransformer):
    """Adds a step to every loop, and measures what is made without a call or an operator."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Filter(nodes.Const(None), _STEP, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        if node.test is not None:
            node.test = nodes.Filter(node.test, _STEP, [], [], None, None)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            if not isinstance(child, nodes.TemplateData):
                node.nodes[i] = self._measured(child)
        return node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        node.body = [self.visit(child) for child in node.body]
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._measured(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._measured(node) if isinstance(node.arg, nodes.Slice) else node

    def _visit(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._measured(node)

    visit_Concat = visit_List = visit_Dict = visit_Filter = _visit

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        measured = nodes.Filter(node, _MEASURED, [], [], None, None)
        measured.set_lineno(node.lineno)
        return measured


class _Generation(Extension):
    """The tag ``generation``, by which a template marks what the assistant says: its content, between the marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        assert isinstance(self.environment, LimitedEnvironment)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.environment.answer_marks)
        return nodes.Scope([begin, *body, end]).set_lineno(line)


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r} of a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # else it prints itself for ever if it holds itself
        return "<namespace>"


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _budget(context: Context) -> Budget:
    return context.parent[BUDGET]


def _check_replace(budget: Budget, text: str, old: Any, new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.check_length(len(text) + text.count(old) * len(new))


def _check_format(budget: Budget, text: str, values: Any) -> None:
    widths = [part for part in "".join(c if c in "0123456789*" else " " for c in text).split() if len(part) > 3]
    if widths or "*" in text:
        raise SecurityError("it formats with a width of more than 999")
    budget.check_length(text.count("%") * (1000 + budget.measure(values)))


@pass_context
def _step(context: Context, value: Any) -> Any:
    _budget(context).step()
    return value


@pass_context
def _measured(context: Context, value: Any) -> Any:
    _budget(context).measure(value)
    return value


@pass_context
def _indent(context: Context, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    shift = len(width) if isinstance(width, str) else width
    _budget(context).check_length(len(text) + (text.count("\n") + 1) * shift)
    return do_indent(text, width, first, blank)


@pass_context
def _join(context: Context, values: Any, separator: str = "", attribute: str | int | None = None) -> str:
    items, budget = list(values), _budget(context)
    budget.check_length(budget.measure(items) + len(items) * len(separator))
    return do_join(context.eval_ctx, items, separator, attribute)


@pass_context
def _replace_filter(context: Context, text: Any, old: str, new: str, count: int | None = None) -> str:
    _check_replace(_budget(context), str(text), old, new)
    return do_replace(context.eval_ctx, text, old, new, count)


@pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: without the HTML escapes of Jinja's own filter."""
    _budget(context).measure(value)
    if isinstance(indent, str | int) and str(indent) not in map(str, range(17)):
        raise SecurityError("it indents JSON by more than 16 spaces")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
