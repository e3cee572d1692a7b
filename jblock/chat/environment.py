"""The jinja2 environment that chat templates are written for.

It is transformers' one: an immutable sandbox in which blocks leave no blank lines, with `tojson` that
escapes no HTML, `raise_exception`, `strftime_now`, `break` and `continue`, and the tag `generation`,
which marks what a model wrote and renders as if it were not there. The sandbox bounds no work: a
template from elsewhere belongs into a process that can be killed (`serving/chat/renderer.py`).
"""

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes, sandbox

# Variables of every template; what else it reads without setting it may be given by a request.
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict(...)`, without the attributes of the type."""

    def __call__(self, *args: Any, **fields: Any) -> dict:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, which takes no name that begins with an underscore."""

    def __init__(*args: Any, **fields: Any):
        self, args = args[0], args[1:]
        content = dict(*args, **fields)
        for name in content:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, content)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r}")


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.cache
def environment() -> sandbox.ImmutableSandboxedEnvironment:
    """The environment; one is enough, since no template can change it."""
    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """The template of a source.

    Raises:
      jinja2.TemplateError: it is none.
    """
    return environment().from_string(source)


@functools.lru_cache(maxsize=64)
def variables(source: str) -> frozenset[str]:
    """What a template reads and does not set, less what every template is given."""
    read = meta.find_undeclared_variables(environment().parse(source))
    return frozenset(read - GIVEN - environment().globals.keys())


@functools.lru_cache(maxsize=64)
def literals(source: str) -> str:
    """All text and all string constants of a template, with null characters between."""
    tree = environment().parse(source)
    texts = [str(node.data) for node in tree.find_all(nodes.TemplateData)]
    texts += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    return "\0".join(texts)


@functools.lru_cache(maxsize=64)
def takes_parts(source: str) -> bool:
    """Whether a template goes through the parts of a message's content; else content is to be one text."""
    tree = environment().parse(source)
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    return loops or any(
        f.name in ("map", "selectattr", "rejectattr") and _is_content(f.node, names)
        for f in tree.find_all(nodes.Filter)
    )


def _is_content(node: Any, names: set[str]) -> bool:
    """Whether an expression is a message's content, or one of the variables that hold it."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Getattr) and node.attr == "content"
