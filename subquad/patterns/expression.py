"""Patterns as text, `Causal() & (Window(7, 0) | Strided(8))`: read without running it, and written to read back.

Read are the constructors of this package with integers, truth values, sequences of integers and patterns as arguments;
the operators `|`, `&` and `~`; parentheses; `.heads({0: ...})` and `.shift(n)`. Anything else is refused: the text is
parsed and never evaluated, so it may come from anywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import singledispatch
from typing import Any

from subquad.config import nearest
from subquad.patterns.bands import Causal, Dilated, Log, Ngram, Strided, Window
from subquad.patterns.blocks import Block, BlockWindow, Random
from subquad.patterns.composition import And, ByHead, Not, Or
from subquad.patterns.pattern import Pattern
from subquad.patterns.shifted import Shifted
from subquad.patterns.tokens import Columns, Documents, Global, Sink

CONSTRUCTORS: dict[str, type[Pattern]] = {
    each.__name__: each
    for each in (
        *(Causal, Window, Dilated, Strided, Ngram, Log),
        *(Block, BlockWindow, Random, Columns, Sink, Global, Documents),
    )
}
"""What an expression may name."""

LONGEST = 4000
"""Characters that are read."""
LARGEST = 2**40
"""No number may be larger, so that sums and products of positions stay within 64 bits."""

_AN_EXAMPLE = "such as Causal() & (Window(7, 0) | Strided(8))"


def parse_pattern(text: str) -> Pattern:
    """The pattern that the text describes.

    Raises:
        ValueError: what isn't understood, at which character, and what is; or arguments that a constructor refuses.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a pattern has at most {LONGEST} characters, got {len(text)}; build it in Python instead")
    text = " ".join(text.split())
    try:
        return _Reader(text).pattern(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        what = f"{error.msg} at character {error.offset or len(text) + 1} of {text!r}"
        raise ValueError(f"the pattern can't be read: {what}; expected one {_AN_EXAMPLE}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("the pattern is nested too deeply; build it in Python instead") from error


class _Reader:
    """Turns the syntax tree of `text` into a pattern."""

    def __init__(self, text: str) -> None:
        self.text = text

    def pattern(self, node: ast.expr) -> Pattern:
        """A constructor, a method or an operator."""
        match node:
            case ast.Call(func=ast.Name(id=name)):
                return self.construct(node, name)
            case ast.Call(func=ast.Attribute(value=owner, attr=method)):
                return self.call(node, self.pattern(owner), method)
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self.pattern(left) & self.pattern(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.pattern(left) | self.pattern(right)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~self.pattern(operand)
            case ast.Name(id=name) if name in CONSTRUCTORS:
                raise self.error(node, f"{name} needs parentheses, as in {name}(...)")
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                raise self.error(node, "patterns are joined by | and &, and turned round by ~, not by words")
        raise self.error(node, f"expected a pattern, {_AN_EXAMPLE}")

    def construct(self, node: ast.Call, name: str) -> Pattern:
        """A constructor with its arguments."""
        constructor = CONSTRUCTORS.get(name)
        if constructor is None:
            raise self.error(node, f"there is no such pattern; {nearest(name, CONSTRUCTORS)}")
        return self.checked(node, constructor, name)

    def call(self, node: ast.Call, owner: Pattern, method: str) -> Pattern:
        """A method of a pattern that has been read."""
        methods: dict[str, Callable[..., Pattern]] = {"heads": owner.heads, "shift": owner.shift}
        if method not in methods:
            raise self.error(node, f"a pattern has the methods .heads and .shift here, not .{method}")
        return self.checked(node, methods[method], f".{method}")

    def checked(self, node: ast.Call, function: Callable[..., Pattern], name: str) -> Pattern:
        """The function's result; a refusal of the arguments gets the place where they stand."""
        arguments = [self.value(argument) for argument in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        if len(named) < len(node.keywords):
            raise self.error(node, "arguments are written out, without **")
        try:
            return function(*arguments, **named)
        except ValueError as error:
            raise self.error(node, str(error)) from error
        except (TypeError, AttributeError) as error:
            raise self.error(node, f"{name} doesn't take these arguments; it is {_signature(name)}") from error

    def value(self, node: ast.expr) -> Any:
        """An argument."""
        match node:
            case ast.Constant(value=bool() | None):
                return node.value
            case ast.Constant(value=int(number)) if number <= LARGEST:
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))) if number <= LARGEST:
                return -number
            case ast.Constant(value=int()):
                raise self.error(node, f"no number here may be larger than {LARGEST}")
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return tuple(self.value(element) for element in elements)
            case ast.Dict(keys=keys, values=values):
                return {self.head(node, key): self.pattern(value) for key, value in zip(keys, values, strict=True)}
            case ast.Call() | ast.BinOp() | ast.UnaryOp():
                return self.pattern(node)
        raise self.error(node, "expected an integer, True, False, None, a sequence of integers or a pattern")

    def head(self, node: ast.Dict, key: ast.expr | None) -> int:
        """The number of a head."""
        match key:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return number
        raise self.error(key or node, "expected the number of a head before each colon")

    def error(self, node: ast.expr, reason: str) -> ValueError:
        """The reason, and the part of the text that it speaks of."""
        part = ast.get_source_segment(self.text, node) or self.text
        shown = part if len(part) <= 40 else f"{part[:39]}…"
        return ValueError(f"{shown!r} at character {node.col_offset + 1} of the pattern: {reason}")


def _signature(name: str) -> str:
    if name == ".heads":
        return ".heads({head: pattern, ...})"
    if name == ".shift":
        return ".shift(offset)"
    return f"{name}({', '.join(_written_field(each) for each in _own_fields(CONSTRUCTORS[name]))})"


def _written_field(field: Any) -> str:
    return field.name if field.default is MISSING else f"{field.name}={field.default!r}"


def _own_fields(constructor: Any) -> list[Any]:
    """The fields that are arguments; those that `resolve` fills in aren't compared."""
    return [field for field in fields(constructor) if field.compare]


@singledispatch
def write_pattern(pattern: Pattern) -> str:
    """A text that `parse_pattern` turns into the same pattern; defaults are left out."""
    arguments = []
    for field in _own_fields(pattern):
        value = getattr(pattern, field.name)
        if value != field.default:
            arguments.append(("" if field.default is MISSING else f"{field.name}=") + _write_value(value))
    return f"{type(pattern).__name__}({', '.join(arguments)})"


@singledispatch
def _write_value(value: Any) -> str:
    return str(value)


@_write_value.register
def _(value: Pattern) -> str:
    return write_pattern(value)


@write_pattern.register
def _(pattern: Or) -> str:
    return " | ".join(write_pattern(part) for part in pattern.parts)


@write_pattern.register
def _(pattern: And) -> str:
    return " & ".join(_enclosed(part, Or) for part in pattern.parts)


@write_pattern.register
def _(pattern: Not) -> str:
    return f"~{_enclosed(pattern.part, Or, And)}"


@write_pattern.register
def _(pattern: Shifted) -> str:
    return f"{_enclosed(pattern.part, Or, And, Not)}.shift({pattern.offset})"


@write_pattern.register
def _(pattern: ByHead) -> str:
    own = ", ".join(f"{head}: {write_pattern(part)}" for head, part in pattern.own)
    return f"{_enclosed(pattern.base, Or, And, Not)}.heads({{{own}}})"


def _enclosed(pattern: Pattern, *kinds: type[Pattern]) -> str:
    """The text, in parentheses where it would otherwise bind too weakly."""
    text = write_pattern(pattern)
    return f"({text})" if isinstance(pattern, kinds) else text
