"""Filter expressions: `width >= 512 and not duplicate and objects in (1, 2)` -> conditions on a table.

A filter is written in a small, safe subset of Python: column names, numbers, strings, True and False, comparisons (also
chained), `in` a list of constants, `is None`, `and`, `or`, `not`, and arithmetic (`width / height < 2`). A row that has
null in a column passes no comparison with that column, negated or not; `column is None` finds such rows.

Integers are compared exactly, whatever their width. Arithmetic is in floating point, so it never overflows and `/`
gives fractions; a division by zero gives null.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from infra.errors import SettingsError
from infra.problems import did_you_mean

LONGEST = 2000  # characters
EXAMPLE = "write it like `width >= 512 and not duplicate and objects in (1, 2)`"

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / pc.if_else(right == 0.0, pc.scalar(pa.scalar(None, pa.float64())), right),
}
# What to write instead of an operator that filters do not have.
_INSTEAD: dict[type[ast.AST], str] = {
    ast.BitAnd: "write `and` in place of `&`",
    ast.BitOr: "write `or` in place of `|`",
    ast.Invert: "write `not` in place of `~`",
    ast.Pow: "write the number out, or multiply",
    ast.FloorDiv: "divide by `/`, which gives fractions: `a // b == 2` is `2 <= a / b < 3`",
    ast.Mod: "there are + - * / alone; let the corpus keep the remainder as a column",
}

Kind = Literal["whole numbers", "unsigned numbers", "fractions", "text", "True or False"]
_TYPES: dict[Kind, pa.DataType] = {
    "whole numbers": pa.int64(),
    "unsigned numbers": pa.decimal128(20, 0),  # it holds every uint64 and every int64
    "fractions": pa.float64(),
    "text": pa.string(),
    "True or False": pa.bool_(),
}
_CONSTANTS: dict[type, Kind] = {bool: "True or False", int: "whole numbers", float: "fractions", str: "text"}
_NUMBERS: tuple[Kind, ...] = ("whole numbers", "unsigned numbers", "fractions")  # two kinds are compared as the later


class _Value(NamedTuple):
    """A column, a constant, or the result of arithmetic on them."""

    text: str
    kind: Kind
    column: pc.Expression | None = None
    constant: Any = None

    def expression(self, kind: Kind) -> pc.Expression:
        if self.column is None:
            return pc.scalar(self.scalar(kind))
        return self.column.cast(_TYPES[kind], safe=False)

    def scalar(self, kind: Kind) -> pa.Scalar:
        convert: Callable[[Any], Any] = {"fractions": float, "unsigned numbers": Decimal}.get(kind, lambda value: value)
        return pa.scalar(convert(self.constant), _TYPES[kind])


def _kind(column_type: pa.DataType) -> Kind | None:
    """How a filter sees a column of this type; None if filters cannot use it."""
    if pa.types.is_boolean(column_type):
        return "True or False"
    if pa.types.is_string(column_type):
        return "text"
    if pa.types.is_floating(column_type):
        return "fractions"
    if pa.types.is_uint64(column_type):
        return "unsigned numbers"
    return "whole numbers" if pa.types.is_integer(column_type) else None


def _common(values: Sequence[_Value]) -> Kind:
    """The kind as which all of these values can be compared; an error if there is none."""
    first = values[0]
    for other in values[1:]:
        if other.kind != first.kind and not {first.kind, other.kind} <= set(_NUMBERS):
            raise SettingsError(
                f"`{first.text}` ({first.kind}) and `{other.text}` ({other.kind}) cannot be compared",
                remedy="compare a column with values of its own type",
            )
    if first.kind not in _NUMBERS:
        return first.kind
    return max((value.kind for value in values), key=_NUMBERS.index)


class Condition(NamedTuple):
    text: str
    expression: pc.Expression


def columns_in(text: str) -> set[str]:
    return {node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)} if text.strip() else set()


def parse_filter(text: str, schema: pa.Schema) -> list[Condition]:
    """The filter's conditions, all of which a row must pass; names and types are checked against the schema.

    `width >= 512 and not duplicate` has two: `width >= 512` and `not duplicate`.
    """
    if not text.strip():
        return []
    root = _parsed(text)
    nodes = root.values if isinstance(root, ast.BoolOp) and isinstance(root.op, ast.And) else [root]
    compiler = _Compiler(schema)
    try:
        conditions = [Condition(ast.unparse(node), compiler.condition(node)) for node in nodes]
    except (RecursionError, OverflowError, pa.ArrowException) as error:
        raise SettingsError(f"the filter `{text[:200]}` cannot be computed ({error})", remedy=EXAMPLE) from None
    masks(schema.empty_table(), conditions)
    return conditions


def masks(table: pa.Table, conditions: Sequence[Condition]) -> list[npt.NDArray[np.bool_]]:
    """For each condition, which rows pass it; a row for which it is null does not."""
    try:
        return _computed(table, conditions)
    except (pa.ArrowException, OverflowError) as error:
        if len(conditions) > 1:
            return [masks(table, [condition])[0] for condition in conditions]
        problem = str(error).splitlines()[0]
        raise SettingsError(
            f"`{conditions[0].text}` cannot be computed ({problem})",
            remedy="compare a column with values of its own type",
        ) from None


def _computed(table: pa.Table, conditions: Sequence[Condition]) -> list[npt.NDArray[np.bool_]]:
    """The masks in one pass over the table, on one thread, which keeps the rows in order."""
    if not conditions:
        return []
    names = [str(number) for number in range(len(conditions))]
    options = acero.ProjectNodeOptions([condition.expression for condition in conditions], names)
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    results = acero.Declaration("project", options, [source]).to_table(use_threads=False)
    return [pc.fill_null(results[name], False).to_numpy() for name in names]


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SettingsError(f"the filter `{text[:200]}` is not an expression ({error})", remedy=EXAMPLE) from None


def _short(node: ast.expr) -> str:
    return ast.unparse(node)[:200]


def _instead(node: ast.expr) -> str:
    """The remedy for an expression that filters do not have."""
    if isinstance(node, ast.Call):
        return f"filters call no functions; {EXAMPLE}"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return "write `0 - x` in place of `-x`"
    return _INSTEAD.get(type(node.op), EXAMPLE) if isinstance(node, ast.BinOp | ast.UnaryOp) else EXAMPLE


def suggestion(name: str, known: Collection[str], label: str) -> str:
    """The remedy for an unknown name: the nearest one that is known, or else all of them, after the label."""
    return did_you_mean(name, known, f"{label}: {', '.join(sorted(known))}")


class _Compiler:
    """Compiles Python's syntax tree into Arrow expressions on the columns of a schema."""

    def __init__(self, schema: pa.Schema) -> None:
        self.kinds = {field.name: kind for field in schema if (kind := _kind(field.type)) is not None}

    def condition(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op=ast.And()):
                return reduce(operator.and_, map(self.condition, node.values))
            case ast.BoolOp():
                return reduce(operator.or_, map(self.condition, node.values))
            case ast.UnaryOp(op=ast.Not()):
                return ~self.condition(node.operand)
            case ast.Compare():
                pairs = zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True)
                return reduce(operator.and_, [self.comparison(*pair) for pair in pairs])
            case ast.Name() if self.kinds.get(node.id, "True or False") == "True or False":
                return self.value(node).expression("True or False")
        raise SettingsError(f"`{_short(node)}` is not a condition", remedy=_instead(node))

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if not isinstance(right, ast.Constant) or right.value is not None:
                raise SettingsError("`is` is for None alone", remedy="write `is None`, or use == to compare values")
            value = self.value(left)
            expression = value.expression(value.kind)
            return expression.is_null() if isinstance(op, ast.Is) else expression.is_valid()
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set):
                raise SettingsError(f"`in {_short(right)}` is not a list", remedy=EXAMPLE)
            contained = self.membership(self.value(left), [self.constant(node) for node in right.elts])
            return contained if isinstance(op, ast.In) else ~contained
        both = self.value(left), self.value(right)
        kind = _common(both)
        return _COMPARE[type(op)](*(value.expression(kind) for value in both))

    def membership(self, value: _Value, constants: list[_Value]) -> pc.Expression:
        kind = _common([value, *constants])
        expression = value.expression(kind)
        members = pa.array([constant.scalar(kind).as_py() for constant in constants], _TYPES[kind])
        # isin gives False for null, which `not` would turn into True.
        return pc.if_else(expression.is_valid(), expression.isin(members), pc.scalar(pa.scalar(None, pa.bool_())))

    def value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Name():
                return _Value(node.id, self.kind_of(node.id), column=pc.field(node.id))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                numbers = self.number(node.left), self.number(node.right)
                return _Value(_short(node), "fractions", column=_ARITHMETIC[type(node.op)](*numbers))
        return self.constant(node)

    def number(self, node: ast.expr) -> pc.Expression:
        value = self.value(node)
        if value.kind not in _NUMBERS:
            raise SettingsError(
                f"`{value.text}` ({value.kind}) cannot be computed with", remedy="compute with columns of numbers"
            )
        return value.expression("fractions")

    def constant(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant(value=value) if type(value) in _CONSTANTS:
                return _Value(_short(node), _CONSTANTS[type(value)], constant=value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return self.constant(ast.Constant(-value))
        raise SettingsError(f"`{_short(node)}` has no place in a filter", remedy=_instead(node))

    def kind_of(self, name: str) -> Kind:
        if name not in self.kinds:
            raise SettingsError(
                f"the filter names `{name}`, which is no column of these shards",
                remedy=suggestion(name, self.kinds, "columns"),
            )
        return self.kinds[name]
