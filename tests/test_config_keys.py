"""Every key of the configuration is used: the code reads it from a value of its model, not only one of the same name."""

from __future__ import annotations

import ast
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from dsno_cluster.config import Config, Profile, load_config
from dsno_cluster.errors import UserError

PACKAGE = Path(__file__).parents[1] / "dsno_cluster"
Models = frozenset[type[BaseModel]]
Names = dict[str, Models]
NOTHING: Models = frozenset()


def models_of(annotation: object) -> Models:
    """The models in a type, and those of their fields."""
    found = {annotation} if isinstance(annotation, type) and issubclass(annotation, BaseModel) else set()
    inner = [field.annotation for model in found for field in model.model_fields.values()]
    return frozenset(found).union(*map(models_of, (*inner, *typing.get_args(annotation))))


MODELS = models_of(Config) | models_of(Profile)
BY_NAME = {model.__name__: frozenset({model}) for model in MODELS}


class Reads(ast.NodeVisitor):
    """The keys that modules read, as (model, key): what an expression is follows from annotations and assignments.

    What a validator reads is not counted: to check a key is not to use it.
    """

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()
        self.of_attributes: dict[str, Models] = defaultdict(frozenset)  # of objects that are no models
        self.of_calls: dict[str, Models] = defaultdict(frozenset)
        self.names: Names = {}

    def annotated(self, annotation: ast.expr | None) -> Models:
        named = ast.walk(annotation) if annotation is not None else ()
        return NOTHING.union(*(BY_NAME.get(n.id, NOTHING) for n in named if isinstance(n, ast.Name)))

    def models(self, node: ast.expr) -> Models:
        """Which models an expression's value may be of."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name, NOTHING)
            case ast.Attribute(value=value, attr=key):
                if owners := self.models(value):
                    fields = [m.model_fields[key].annotation for m in owners if key in m.model_fields]
                    return frozenset(m for m in MODELS if m in fields or _among(m, fields))
                return self.of_attributes[key]
            case ast.Call(func=ast.Attribute(value=value, attr="model_copy")):
                return self.models(value)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                return self.of_calls[name]
            case ast.BoolOp(values=values):
                return NOTHING.union(*map(self.models, values))
        return NOTHING

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.keys |= {(m.__name__, node.attr) for m in self.models(node.value) if node.attr in m.model_fields}
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.names = self.names, self.names | {"self": BY_NAME.get(node.name, NOTHING)}
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                self.of_attributes[field.target.id] |= self.annotated(field.annotation)
        self.generic_visit(node)
        self.names = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any("validator" in ast.unparse(decorator) for decorator in node.decorator_list):
            return
        self.of_calls[node.name] |= self.annotated(node.returns)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given = {a.arg: self.annotated(a.annotation) for a in arguments if a.arg != "self"}
        before, self.names = self.names, self.names | given
        for statement in node.body:
            self.visit(statement)
        self.names = before

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            for name, value in _pairs(target, node.value):
                self.assign(name, self.models(value))

    def assign(self, target: ast.expr, models: Models) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = models
        elif isinstance(target, ast.Attribute):
            self.of_attributes[target.attr] |= models


def _among(model: type[BaseModel], annotations: list[object]) -> bool:
    return any(model in typing.get_args(annotation) for annotation in annotations)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, its in zip(target.elts, value.elts, strict=False):
            yield from _pairs(one, its)
    else:
        yield target, value


def keys_read(*sources: str) -> set[tuple[str, str]]:
    reads = Reads()
    for _ in range(2):  # what a later module says of attributes and calls holds in an earlier one too
        reads.keys.clear()
        for source in sources:
            reads.names = {}
            reads.visit(ast.parse(source))
    return reads.keys


def test_every_key_is_used() -> None:
    """A key that no code reads is a promise that nobody keeps."""
    read = keys_read(*(file.read_text() for file in sorted(PACKAGE.rglob("*.py"))))
    assert {(model.__name__, key) for model in MODELS for key in model.model_fields} - read == set()


def test_a_key_of_something_else_is_not_taken_for_it() -> None:
    read = keys_read("""
def run(config: Config, report: Report) -> None:
    settings, other = config.training, report.training
    print(settings.steps, other.lr, report.threads, settings.unknown)

class Training:
    @model_validator(mode="after")
    def check(self) -> None:
        assert self.batch_size
""")
    assert read == {("Config", "training"), ("Training", "steps")}


GROUPS = [name for name, field in Config.model_fields.items() if models_of(field.annotation)]


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_refuses_an_unknown_key(group: str) -> None:
    with pytest.raises(UserError, match=f"unknown key {group}.nonsense"):
        load_config("configs/digits.yaml", [f"{group}.nonsense=1"])
