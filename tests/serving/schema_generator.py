"""Draws JSON schemas of many kinds, and a few that cannot be followed."""

import random
import string
from typing import Any

Schema = dict[str, Any]

# What a server must refuse by name: keyword by a schema that has it.
UNSUPPORTED: dict[str, Schema] = {
    "not": {"type": "string", "not": {"const": "a"}},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 0}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "maxProperties": {"type": "object", "properties": {"a": {}}, "maxProperties": 3},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
}
_FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration")
_PATTERNS = (
    r"^[a-z]{1,8}$",
    r"^\d{3}-\d{4}$",
    r"^(red|green|blue)$",
    r"^[A-F0-9]{2}(:[A-F0-9]{2}){2}$",
    r"^v\d\.\d\.\d$",
)


class SchemaGenerator:
    """Draws schemas from a seed. Most values are short, so that answers end."""

    def __init__(self, seed: int, unsupported: float = 0.04):
        """`unsupported` is the share of those that cannot be followed."""
        self._random = random.Random(seed)
        self._unsupported = unsupported

    def draw(self) -> tuple[Schema, str | None]:
        """A schema, and the keyword for which it cannot be followed, if it cannot."""
        if self._random.random() < self._unsupported:
            keyword, schema = self._random.choice(list(UNSUPPORTED.items()))
            where = self._random.choice(("root", "property", "item"))
            if where == "property":
                schema = self._closed({self._name(): schema})
            elif where == "item":
                schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}
            return schema, keyword
        if self._random.random() < 0.15:
            return self._with_references(), None
        return self._value(0), None

    def _value(self, depth: int) -> Schema:
        kinds = [self._string, self._number, self._choice, self._constant, self._format]
        weights = [4, 3, 3, 1, 1]
        if depth < 2:
            kinds += [self._object, self._array, self._tuple, self._any_of, self._all_of, self._map]
            weights += [6, 3, 1, 2, 1, 1]
        (kind,) = self._random.choices(kinds, weights)
        return kind(depth)

    def _string(self, depth: int) -> Schema:
        if self._random.random() < 0.3:
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        least = self._random.randrange(3)
        return {
            "type": "string",
            "minLength": least,
            "maxLength": least + self._random.randrange(1, 12),
        }

    def _number(self, depth: int) -> Schema:
        least = self._random.randrange(-100, 100)
        kind = self._random.choice(("integer", "number"))
        schema: Schema = {
            "type": kind,
            "minimum": least,
            "maximum": least + self._random.randrange(1, 500),
        }
        if kind == "integer" and self._random.random() < 0.3:
            schema |= {"multipleOf": self._random.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
        elif self._random.random() < 0.3:
            schema["exclusiveMinimum"] = schema.pop("minimum")
        return schema

    def _choice(self, depth: int) -> Schema:
        values = [self._text(), self._text(), self._random.randrange(9), None, True]
        return {"enum": self._random.sample(values, self._random.randrange(1, 5))}

    def _constant(self, depth: int) -> Schema:
        return self._random.choice(
            ({"const": self._text()}, {"const": {"a": [1, None]}}, {"type": "boolean"})
        )

    def _format(self, depth: int) -> Schema:
        return {"type": "string", "format": self._random.choice(_FORMATS)}

    def _object(self, depth: int) -> Schema:
        names = {self._name() for _ in range(self._random.randrange(1, 5))}
        schema = self._closed({name: self._value(depth + 1) for name in sorted(names)})
        schema["required"] = [n for n in schema["properties"] if self._random.random() < 0.7]
        return schema

    def _array(self, depth: int) -> Schema:
        least = self._random.randrange(2)
        return {
            "type": "array",
            "items": self._value(depth + 1),
            "minItems": least,
            "maxItems": least + self._random.randrange(1, 4),
        }

    def _tuple(self, depth: int) -> Schema:
        items = [self._value(depth + 1) for _ in range(self._random.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._value(depth + 1) for _ in range(self._random.randrange(2, 4))]}

    def _all_of(self, depth: int) -> Schema:
        least = self._random.randrange(50)
        return {
            "allOf": [
                {"type": "integer", "minimum": least},
                {"type": "integer", "maximum": least + self._random.randrange(1, 100)},
            ]
        }

    def _map(self, depth: int) -> Schema:
        return {
            "type": "object",
            "properties": {self._name(): {"type": "boolean"}},
            "patternProperties": {"^x_[a-z]{1,3}$": self._value(2)},
            "additionalProperties": False,
        }

    def _with_references(self) -> Schema:
        item = self._value(2)
        node = {
            "type": "object",
            "properties": {
                "value": {"$ref": "#/$defs/item"},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        wanted = self._random.choice(("item", "node"))
        return {"$defs": {"item": item, "node": node}, "$ref": f"#/$defs/{wanted}"}

    def _closed(self, properties: Schema) -> Schema:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def _name(self) -> str:
        return "".join(self._random.choices(string.ascii_lowercase, k=self._random.randrange(1, 6)))

    def _text(self) -> str:
        letters = string.ascii_letters + ' _-éß"\\/'
        return "".join(self._random.choices(letters, k=self._random.randrange(1, 9)))
