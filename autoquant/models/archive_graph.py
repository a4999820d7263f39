"""Checking the graph of a torch.export archive: what may stand in it, all else is refused.

Loading a graph evaluates its shape expressions and input guards, pastes its names into Python code,
and looks its operators up by any path below ``torch``. Here every text in it is held against what
torch writes in that place.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import torch

_IDENTIFIER = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
_PLAIN = re.compile(r"[\w.\-:+<=>, ]*", re.ASCII)
_KEY = re.compile(r"[\w.\- ]*", re.ASCII)
_STACK = re.compile(r"[\w.,;:@\[\]()\- ]*", re.ASCII)
_LITERAL = re.compile(r"[A-Za-z_]\w*|[-+]?[\d.]+(e[-+]?\d+)?", re.ASCII)
_MARKS = re.compile(r"['\"\\\r\n]")

_NAMESPACES = frozenset({"aten", "prims", "quantized", "quantized_decomposed", "torchvision"})
_BLOCKS = frozenset(
    {"cond", "while_loop", "scan", "map_impl", "associative_scan", "flex_attention"}
    | {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
)
_ARITHMETIC = frozenset(
    {"eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod"}
    | {"pow", "truediv", "and_", "or_", "not_", "lshift", "rshift", "getitem"}
)
_SYMBOLIC = re.compile(r"torch\.(sym_[a-z]+|_sym_[a-z]+)|math\.(trunc|ceil|floor|sqrt)")
_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Float", "Rational", "Half", "Zero", "One", "NegativeOne", "Tuple"}
    | {"Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor", "ceiling", "max", "min", "abs"}
    | {"Equality", "Unequality", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan"}
    | {"Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "ITE", "Piecewise", "ExprCondPair"}
    | {"FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilDiv", "Identity"}
    | {"CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "RoundDecimal"}
    | {"LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "ToFloat"}
    | {"IsNonOverlappingAndDenseIndicator"}
)
_MEASURES = frozenset({"size", "stride", "storage_offset"})
_MATHEMATICS = frozenset({"floor", "ceil", "trunc", "sqrt", "inf", "isnan"})
_SYNTAX = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
    *(ast.boolop, ast.cmpop, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant),
    *(ast.Subscript, ast.Attribute, ast.Tuple),
)
_CONTAINERS = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)
_LONGEST = 10_000


class Unsafe(Exception):
    """The archive holds something that would run code; the message says what, after "it"."""


def clean_program(program: dict[str, Any]) -> dict[str, Any]:
    """Return the program's JSON with what is not needed left out; raise Unsafe as described above.

    Devices become the CPU: that is where the tensors are loaded.
    """
    graph = program["graph_module"]
    graph["metadata"] = {}
    graph["treespec_namedtuple_fields"] = {}
    graph["module_call_graph"] = [e for e in graph["module_call_graph"] if e["fqn"] == ""]
    return clean(program)


def clean(value: Any, key: str = "") -> Any:
    """Return ``value``, which stands under ``key``, checked."""
    if isinstance(value, dict):
        return _clean_table(value, key)
    if isinstance(value, list):
        return [clean(v, key) for v in value]
    if not isinstance(value, str):
        return value
    if key in ("as_string", "as_strings"):
        # Messages and modes; quotation marks could end the text that one is pasted into.
        return _MARKS.sub(" ", value)
    _TEXTS.get(key, _check_plain)(value)
    return value


def _clean_table(table: dict[str, Any], key: str) -> dict[str, Any]:
    if key in ("device", "as_device"):
        return {"type": "cpu", "index": None}
    if key == "metadata":
        stack = table.get("nn_module_stack", "")
        return {"nn_module_stack": stack} if stack and _STACK.fullmatch(stack) else {}
    for name in table:
        if not (_IDENTIFIER if key.endswith("_values") else _PLAIN).fullmatch(name):
            raise Unsafe(f"names something {name[:60]!r}")
        if name in ("as_custom_obj", "custom_obj"):
            raise Unsafe("holds an object that is no tensor")
    return {name: clean(v, name) for name, v in table.items()}


def _check_plain(text: str) -> None:
    if not _PLAIN.fullmatch(text):
        raise Unsafe(f"names something {text[:60]!r}")


def _check_identifier(text: str) -> None:
    if not _IDENTIFIER.fullmatch(text):
        raise Unsafe(f"has a variable named {text[:60]!r}")


def _check_operator(text: str) -> None:
    """Accept torch's operators on tensors and integer arithmetic; none of them opens a file."""
    parts = text.split(".")
    known = False
    if text.startswith("torch.ops.higher_order."):
        known = len(parts) == 4 and parts[3] in _BLOCKS
    elif text.startswith("torch.ops.") and len(parts) == 5 and parts[2] in _NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
        operator = getattr(packet, parts[4], None)
        known = isinstance(operator, torch._ops.OpOverload) and not any(
            a.name == "filename" for a in operator._schema.arguments
        )
    elif text.startswith("_operator."):
        known = len(parts) == 2 and parts[1] in _ARITHMETIC
    elif _SYMBOLIC.fullmatch(text):
        known = True
    if not known:
        raise Unsafe(f"calls {text[:80]!r}, which is none of torch's own operators on tensors")


def _check_arithmetic(text: str) -> None:
    """Accept expressions of numbers, symbols, input sizes and the functions that torch writes."""
    try:
        # A comment or a line break would be pasted into code with the rest.
        if len(text) > _LONGEST or re.search(r"[#;\\\r\n]", text):
            raise ValueError
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unsafe(f"has a shape expression that is none: {text[:60]!r}") from None
    for node in ast.walk(tree):
        if not isinstance(node, _SYNTAX) or not _is_arithmetic(node):
            raise Unsafe(f"has a shape expression that is more than arithmetic: {text[:60]!r}")


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node.func.id in _FUNCTIONS
        return isinstance(node.func, ast.Attribute)
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "math":
            return node.attr in _MATHEMATICS
        return node.attr in _MEASURES
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_LITERAL.fullmatch(node.value))
        return isinstance(node.value, (bool, int, float))
    if isinstance(node, ast.Name):
        return "__" not in node.id
    return True


def _check_structure(text: str) -> None:
    """Accept nested tuples, lists and dicts whose keys are plain words."""
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise Unsafe("describes its inputs or outputs in a way that torch does not") from None
    pending = [tree]
    while pending:
        node = pending.pop()
        if node["type"] not in _CONTAINERS:
            raise Unsafe(
                f"takes or returns a {str(node['type'])[:60]!r}: only tuples, lists and dicts of "
                f"tensors are safe"
            )
        keys = json.loads(node["context"] or "null")
        plain = isinstance(keys, list) and all(
            isinstance(k, int) or (isinstance(k, str) and _KEY.fullmatch(k)) for k in keys
        )
        if protocol != 1 or not (keys is None or plain):
            raise Unsafe("describes its inputs or outputs in a way that torch does not")
        pending.extend(node["children_spec"])


_TEXTS = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_arithmetic,
    "guards_code": _check_arithmetic,
    "in_spec": _check_structure,
    "out_spec": _check_structure,
    "name": _check_identifier,
    "as_name": _check_identifier,
    "forward_arg_names": _check_identifier,
}
