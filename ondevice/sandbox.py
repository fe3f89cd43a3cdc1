"""Runs a chat template, which is a program written by a stranger, within fixed limits.

A template comes with the model file. Jinja's immutable sandbox keeps it away from Python's
internals, but lets it take all time and memory. So here every step that can repeat, copy or grow
is metered: the syntax tree is rewritten before it is compiled, so that loops, comparisons,
literals, slices and all output pass through the meter, and the environment's hooks meter calls,
operators, filters and tests.

    price of a step   16 units, plus 1 per character and 16 per element, counted in depth
    budget            4 Mi units, plus 64 per character of the messages
    deadline          2 seconds, looked at in every step

Where the size of a result is known beforehand (`'x' * n`, `replace`, `ljust`, `%20d`) it is paid
for before it is made. Whatever lives was paid for, so no single step can outlast its price, and
memory stays within a few bytes per unit. Only the methods, filters and functions named below can
be called. There are no other templates, so tags that load one are refused.
"""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.environment import Environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_environment
from jinja2.visitor import NodeTransformer

SOURCE_LIMIT = 1 << 16  # characters
NODE_LIMIT = 10_000
CALL_DEPTH = 64
RANGE_LIMIT = 100_000
INTEGER_BITS = 4096
PADDING_LIMIT = 1000  # spaces of one indentation
BUDGET = 1 << 22
BUDGET_PER_CHARACTER = 64
SECONDS = 2.0
_STEP = 16

_METHODS: dict[type, set[str]] = {
    str: {
        *("capitalize", "casefold", "center", "count", "endswith", "find", "index", "isalnum"),
        *("isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace"),
        *("istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix"),
        *("removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip"),
        *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill"),
    },
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
}
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby"),
    *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "select", "selectattr", "sort", "string", "title", "trim"),
    *("unique", "upper"),
)
# These look at a type or a length, pass on a part, or are lazy: their price has no size in it.
_SHALLOW_FILTERS = {
    *("count", "d", "default", "first", "items", "last", "length", "map", "reject", "rejectattr"),
    *("select", "selectattr"),
}
_DEEP_TESTS = {
    *("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan"),
    *(">", "ge", ">=", "in"),
}
_CONTAINERS = (list, tuple, KeysView, ValuesView, ItemsView)


class TemplateRefusal(TemplateError):
    """The template itself called raise_exception."""


class TemplateLimit(TemplateError):
    """The template ran past a limit."""


class Meter:
    """What one rendering may still spend."""

    def __init__(self, characters: int) -> None:
        self.left = BUDGET + BUDGET_PER_CHARACTER * characters
        self.depth = 0  # of calls into the template itself
        self.deadline = time.monotonic() + SECONDS

    def spend(self, units: int) -> None:
        """Pay for one step of this size, or raise TemplateLimit."""
        self.left -= units + _STEP
        if self.left < 0:
            raise TemplateLimit("does too much work or makes too much text")
        if time.monotonic() > self.deadline:
            raise TemplateLimit(f"runs longer than {SECONDS:g} seconds")

    def measure(self, *values: Any) -> int:
        """Units of the values in depth; stops with TemplateLimit at what is left."""
        total = 0
        pending = list(values)
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                total += len(value)
            elif isinstance(value, int):
                total += value.bit_length() >> 3
            elif isinstance(value, range):
                total += _STEP * len(value)
            elif isinstance(value, Namespace):
                total += _STEP
                pending.append(object.__getattribute__(value, "_Namespace__attrs"))
            elif isinstance(value, dict):
                total += _STEP * len(value)
                pending += value.keys()
                pending += value.values()
            elif isinstance(value, _CONTAINERS):
                total += _STEP * len(value)
                pending += value
            if total > self.left:
                raise TemplateLimit("does too much work or makes too much text")
        return total

    def charge(self, *values: Any) -> None:
        """Pay for a step that touches all of these values."""
        self.spend(self.measure(*values))

    def walk(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, each paid for when it is taken."""
        for value in values:
            self.spend(0)
            yield value

    def format(self, text: str, values: Any) -> None:
        """Pay for `text % values` or `text.format(values)` before it is made."""
        widths = re.findall(r"\d+", text)
        if any(len(width) > 6 for width in widths) or re.search(r"%[^%\w]*\*|\{[^{}]*\{", text):
            raise TemplateLimit("formats a value to a width out of bounds")
        fields = text.count("%") + text.count("{")
        self.spend(len(text) + sum(map(int, widths)) + fields * self.measure(values))


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja set up as transformers does for chat templates, with all work metered."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            finalize=_finalize,
            extensions=[loopcontrols, _Generation],
        )
        self.meter = Meter(0)
        self.filters = {
            name: self._metered(function, name not in _SHALLOW_FILTERS)
            for name, function in _ALLOWED_FILTERS.items()
        }
        self.filters["measured"] = self._measured
        self.filters["metered"] = lambda values: self.meter.walk(values)
        tests: Any = dict(self.tests)
        self.tests = {
            name: self._metered(function, name in _DEEP_TESTS) for name, function in tests.items()
        }
        self.globals = {
            "range": _range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": Namespace,
            "dict": dict,
        }

    def load(self, source: str) -> Template:
        """Compile a template; a TemplateSyntaxError knows its line."""
        tree = _Metering(self).visit(self.parse(source))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def _metered(self, function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
        @wraps(function)  # keeps Jinja's mark of what comes before the arguments
        def metered(*args: Any, **kwargs: Any) -> Any:
            if not deep:
                self.meter.spend(0)
            else:
                args = tuple(list(x) if isinstance(x, GeneratorType) else x for x in args)
                self.meter.charge(*args, *kwargs.values())
            result = function(*args, **kwargs)
            if isinstance(result, GeneratorType):
                return self.meter.walk(result)
            if deep:
                self.meter.charge(result)
            return result

        return metered

    def _measured(self, value: Any) -> Any:
        self.meter.charge(value)
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call, and pay for it."""
        if isinstance(function, BuiltinMethodType):
            args = self._pay_method(function, args)
            result = super().call(context, function, *args, **kwargs)
            self.meter.charge(result)
            return result
        if isinstance(function, LoopContext):  # a recursive loop's next level
            args = tuple(self.meter.walk(values) for values in args)
        if isinstance(function, Macro | BlockReference | LoopContext):
            return self._call_template(context, function, args, kwargs)
        if isinstance(function, Undefined):
            self.meter.spend(0)  # raises, and says which name it is
        elif self._is_known(function):
            self.meter.charge(*args, *(v for name, v in kwargs.items() if name[0] != "_"))
        else:
            raise SecurityError(f"calls a value of type {type(function).__name__}")
        return super().call(context, function, *args, **kwargs)

    def _call_template(self, context: Context, function: Any, args: Any, kwargs: Any) -> Any:
        meter = self.meter
        meter.spend(0)  # arguments are only bound to names
        meter.depth += 1
        if meter.depth > CALL_DEPTH:
            raise TemplateLimit("nested too deeply")
        result = super().call(context, function, *args, **kwargs)
        meter.depth -= 1
        return result

    def _is_known(self, function: Any) -> bool:
        if isinstance(function, MethodType):
            return isinstance(function.__self__, LoopContext)
        return isinstance(function, _Formatter) or any(
            function is known for known in self.globals.values()
        )

    def _pay_method(self, method: BuiltinMethodType, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Check and pay for a method of a plain value; the arguments to call it with."""
        owner, name = method.__self__, method.__name__
        allowed = (names for kind, names in _METHODS.items() if isinstance(owner, kind))
        if name not in next(allowed, ()):
            raise SecurityError(f"calls the method {name} of a {type(owner).__name__}")
        if name == "join":
            args = tuple(list(self.meter.walk(values)) for values in args)
        self.meter.charge(owner, *args)
        if name == "join" and args and isinstance(owner, str):
            self.meter.spend(len(owner) * len(args[0]))
        elif name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
            self.meter.spend(max(args[0], 0))
        elif name == "replace" and len(args) > 1 and isinstance(owner, str):
            self.meter.spend(_growth(owner, *args[:2]))
        return args

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """One arithmetic operation, refused if its result would be too large."""
        self.meter.charge(left, right)
        numbers = [abs(value).bit_length() for value in (left, right) if isinstance(value, int)]
        if operator == "*" and len(numbers) == 1:
            sequence, count = (left, right) if isinstance(right, int) else (right, left)
            self.meter.spend(max(count, 0) * (_STEP + self.meter.measure(sequence)))
        elif operator == "%" and isinstance(left, str):
            self.meter.format(left, right)
        elif len(numbers) == 2 and operator == "**":
            numbers = [numbers[0] * max(right, 0)]
        if sum(numbers) > INTEGER_BITS:
            raise TemplateLimit(f"computes with an integer of more than {INTEGER_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Item or attribute of a value; a tuple as key is paid for, hashing it takes time."""
        if isinstance(argument, tuple):
            self.meter.charge(argument)
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once, instead of on use."""
        raise SecurityError(f"uses the attribute {attribute} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, with its result paid for."""
        function = super().wrap_str_format(value)
        return None if function is None else _Formatter(self.meter, value.__self__, function)


class _Formatter:
    """One string's `format` method."""

    def __init__(self, meter: Meter, text: str, function: Callable[..., str]) -> None:
        self._meter, self._text, self._function = meter, text, function

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self._meter.format(self._text, [args, kwargs])
        return self._function(*args, **kwargs)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: marks an answer for training, means nothing here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Puts the meter into a syntax tree."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._nodes = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._nodes += 1
        if self._nodes > NODE_LIMIT:  # compiling takes up to 0.1 ms a node
            raise TemplateSyntaxError(f"more than {NODE_LIMIT} operations", node.lineno)
        return super().visit(node, *args, **kwargs)

    def _through(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(
            node, name, [], [], None, None, lineno=node.lineno, environment=self._environment
        )

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = self._through("metered", node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._through("measured", node.expr)
        for operand in node.ops:
            operand.expr = self._through("measured", operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._through("measured", part) for part in node.nodes]
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through("measured", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._through("measured", node) if isinstance(node.arg, nodes.Slice) else node

    def _measured(self, node: nodes.Literal) -> nodes.Node:
        self.generic_visit(node)
        return self._through("measured", node)

    visit_List = visit_Dict = _measured

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        # Plain text would be written past the environment's finalize, where output is paid for.
        return nodes.Const(node.data, lineno=node.lineno, environment=self._environment)

    def _refuse(self, node: nodes.Node) -> NoReturn:
        raise TemplateSyntaxError(f"{type(node).__name__} cannot be used here", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    _meter(context.environment).charge(value)
    return value


def _meter(environment: Environment) -> Meter:
    assert isinstance(environment, MeteredEnvironment)
    return environment.meter


def _growth(text: str, old: str, new: str) -> int:
    """Characters that replacing `old` by `new` can add."""
    return text.count(old) * len(new)


def _escape(value: Any) -> str:
    return html.escape(str(value))


@pass_environment
def _replace(environment: Environment, value: Any, old: str, new: str, count: int = -1) -> str:
    text = str(value)
    _meter(environment).spend(_growth(text, str(old), str(new)))
    return text.replace(str(old), str(new), count)


@pass_environment
def _join(environment: Environment, value: Any, d: Any = "", attribute: Any = None) -> str:
    items, separator = list(value), str(d)
    if attribute is not None:
        items = list(map(make_attrgetter(environment, attribute), items))
    _meter(environment).charge(items)
    _meter(environment).spend(len(separator) * len(items))
    return separator.join(map(str, items))


@pass_environment
def _indent(
    environment: Environment, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    text, padding = str(value), _padding(width) or ""
    _meter(environment).spend(len(padding) * (2 + len(text.splitlines())))
    return str(FILTERS["indent"](text, padding, first, blank))


@pass_environment
def _format(environment: Environment, value: Any, *args: Any, **kwargs: Any) -> str:
    _meter(environment).format(str(value), [args, kwargs])
    return str(value) % (kwargs or args)


@pass_environment
def _tojson(
    environment: Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=_padding(indent),
        separators=separators,
        sort_keys=sort_keys,
    )
    parts = []
    for part in encoder.iterencode(value):
        _meter(environment).spend(len(part))
        parts.append(part)
    return "".join(parts)


def _padding(width: Any) -> str | None:
    """Spaces of an indentation given as a number or as text."""
    if width is None:
        return None
    if (len(width) if isinstance(width, str) else int(width)) > PADDING_LIMIT:
        raise TemplateLimit(f"indents by more than {PADDING_LIMIT} characters")
    return width if isinstance(width, str) else " " * int(width)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 32:
        raise TemplateLimit("rounds to more than 32 digits")
    return FILTERS["round"](value, precision, method)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if numbers and abs(numbers[-1] - numbers[0]) // abs(numbers.step) >= RANGE_LIMIT:
        raise TemplateLimit(f"makes a range of more than {RANGE_LIMIT} numbers")
    return numbers


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form[:64])


_ALLOWED_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: FILTERS[name] for name in _FILTERS},
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "safe": str,
    "tojson": _tojson,
}
