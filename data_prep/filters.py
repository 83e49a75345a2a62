"""Filter expressions: `width >= 512 and not duplicate and objects in (1, 2)` -> conditions on a table.

A small safe grammar in Python's syntax: column names, numbers, texts, True and False, comparisons (also chained), `in`
a list of constants, `is None`, `and`, `or`, `not`, and arithmetic (`width / height < 2`). A row without a value in a
column passes no comparison with it, negated or not; `column is None` finds such rows.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from infra.config import nearest
from infra.errors import SettingsError

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
    ast.Div: lambda left, right: left.cast(pa.float64()) / right.cast(pa.float64()),
}


class Condition(NamedTuple):
    text: str
    expression: pc.Expression


def columns_in(text: str) -> set[str]:
    return {node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)} if text.strip() else set()


def parse_filter(text: str, schema: pa.Schema) -> list[Condition]:
    """The filter's conditions, all of which a row must pass; names and types are checked against the schema."""
    if not text.strip():
        return []
    whole = _parsed(text)
    parts = whole.values if isinstance(whole, ast.BoolOp) and isinstance(whole.op, ast.And) else [whole]
    reader = _Reader(schema)
    conditions = []
    for part in parts:
        try:
            condition = Condition(ast.unparse(part), reader.condition(part))
        except (RecursionError, OverflowError, pa.ArrowException) as error:
            raise SettingsError(f"the filter `{text[:200]}` cannot be computed ({error})", remedy=EXAMPLE) from None
        conditions.append(condition)
    masks(schema.empty_table(), conditions)
    return conditions


def masks(table: pa.Table, conditions: Sequence[Condition]) -> list[npt.NDArray[np.bool_]]:
    """Which rows pass each of the conditions, each taken alone; a condition without an answer is not passed."""
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
    """All in one pass, and in one thread, which keeps the rows in order."""
    if not conditions:
        return []
    names = [str(number) for number in range(len(conditions))]
    wanted = acero.ProjectNodeOptions([condition.expression for condition in conditions], names)
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    found = acero.Declaration("project", wanted, [source]).to_table(use_threads=False)
    return [pc.fill_null(found[name], False).to_numpy() for name in names]


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SettingsError(f"the filter `{text[:200]}` is not an expression ({error})", remedy=EXAMPLE) from None


class _Reader:
    def __init__(self, schema: pa.Schema) -> None:
        types = pa.types
        self.types = {
            field.name: field.type
            for field in schema
            if types.is_boolean(field.type)
            or types.is_integer(field.type)
            or types.is_floating(field.type)
            or types.is_string(field.type)
        }

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
            case ast.Name() if pa.types.is_boolean(self.types.get(node.id, pa.bool_())):
                return self.value(node)
        raise SettingsError(f"`{ast.unparse(node)[:200]}` is not a condition", remedy=EXAMPLE)

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if not isinstance(right, ast.Constant) or right.value is not None:
                raise SettingsError("`is` is for None alone", remedy="use == to compare values")
            value = self.value(left)
            return value.is_null() if isinstance(op, ast.Is) else value.is_valid()
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set):
                raise SettingsError(f"`in {ast.unparse(right)[:200]}` is not a list", remedy=EXAMPLE)
            value = self.value(left)
            found = value.isin([self.constant(part) for part in right.elts])
            # isin says False of a missing value, which `not` would turn into True.
            known = pc.if_else(value.is_valid(), found, pc.scalar(None).cast(pa.bool_()))
            return known if isinstance(op, ast.In) else ~known
        return _COMPARE[type(op)](self.value(left), self.value(right))

    def value(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.Name():
                return pc.field(self.known(node.id))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return _ARITHMETIC[type(node.op)](self.value(node.left), self.value(node.right))
        return pc.scalar(self.constant(node))

    def constant(self, node: ast.expr) -> bool | int | float | str:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
        raise SettingsError(f"`{ast.unparse(node)[:200]}` has no place in a filter", remedy=EXAMPLE)

    def known(self, name: str) -> str:
        if name not in self.types:
            near = nearest(name, self.types)
            known = ", ".join(sorted(self.types))
            raise SettingsError(
                f"the filter names `{name}`, which is no column of these shards",
                remedy=f"did you mean `{near}`?" if near else f"columns: {known}",
            )
        return name
