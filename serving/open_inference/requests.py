"""A request in tensors, named as Triton's backends for language models name them, as one of `jblock.v1`."""

import dataclasses
import json
from typing import Any

import msgspec

from serving.errors import invalid
from serving.generation import Ask
from serving.http.errors import undecodable
from serving.http.fields import Common, fill, structure
from serving.open_inference import messages as pb
from serving.open_inference.tensors import inputs_of, parameter
from serving.v1 import jblock_pb2 as v1

# vLLM's default, which Triton's backend has.
_MAX_TOKENS = 16
# Inputs that TensorRT-LLM's backend names otherwise.
_NAMES = {"stop_words": "stop", "random_seed": "seed", "min_length": "min_tokens"}
_FLAGS = (
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
# Parameters of the protocol that are none of sampling.
_PROTOCOL = ("triton_enable_empty_final_response", "priority", "timeout", "binary_data_output")
INPUTS = (
    ("text_input", "BYTES"),
    ("stream", "BOOL"),
    ("sampling_parameters", "BYTES"),
    ("max_tokens", "INT32"),
    *((name, "BOOL") for name in _FLAGS),
)


class Fields(Common, forbid_unknown_fields=True, kw_only=True):
    """The sampling of a request."""

    logprobs: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a request asks for.

    Attributes:
      ask: for the generator.
      text: the prompt.
      stream: parts as they come.
      flags: names of `_FLAGS` that are set.
      empty_final: a stream ends with a response without outputs.
    """

    ask: Ask
    text: str
    stream: bool
    flags: frozenset[str]
    empty_final: bool


def wanted_of(request: pb.ModelInferRequest, streaming: bool) -> Wanted:
    """Reads a request; `streaming` where the call may have several responses.

    Raises:
      RequestError: an input is missing, unknown or wrong.
    """
    inputs = inputs_of(request)
    given = {n: parameter(p) for n, p in request.parameters.items()}
    empty_final = bool(given.pop(_PROTOCOL[0], False))
    for name in _PROTOCOL[1:]:
        given.pop(name, None)
    texts = inputs.pop("text_input", None)
    if texts is None or len(texts) != 1:
        raise invalid("inputs.text_input: is missing; send one text")
    for name, values in inputs.items():
        given[name] = values if name == "stop_words" else _one(name, values)
    stream = bool(given.pop("stream", False))
    if stream and not streaming:
        raise invalid("inputs.stream: needs ModelStreamInfer; leave it out, or call that")
    flags = {name: bool(given.pop(name)) for name in _FLAGS if name in given}
    if stream and flags.get("exclude_input_in_output") is False:
        raise invalid("inputs.exclude_input_in_output: a stream never has the input; leave it out")
    if stream:
        flags["exclude_input_in_output"] = True
    fields = _fields(given)
    generate = v1.GenerateRequest(model=request.model_name, text=texts[0])
    fill(generate, fields)
    field = structure(generate, fields)
    if stream and generate.n > 1:
        raise invalid("n: a stream has one answer; leave it out")
    generate.logprobs = fields.logprobs is not None or flags.get("return_cumulative_logprob", False)
    if fields.logprobs:
        generate.top_logprobs = fields.logprobs
    ask = Ask(request=generate, grammar_field=field, default_max_tokens=_MAX_TOKENS)
    return Wanted(
        ask=ask,
        text=texts[0],
        stream=stream,
        flags=frozenset(name for name, value in flags.items() if value),
        empty_final=empty_final,
    )


def _one(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise invalid(f"inputs.{name[:40]}: has {len(values)} values; send one")
    return values[0]


def _fields(given: dict[str, Any]) -> Fields:
    """The sampling of inputs and parameters, and of `sampling_parameters`: JSON of the same names."""
    more = given.pop("sampling_parameters", None)
    if more is not None:
        try:
            found = json.loads(more)
        except (ValueError, TypeError, RecursionError):
            raise invalid("inputs.sampling_parameters: is no JSON; send an object") from None
        if not isinstance(found, dict):
            raise invalid("inputs.sampling_parameters: is no object; send one")
        given = {**found, **given}
    named = {_NAMES.get(name, name): value for name, value in given.items()}
    if "model" in named:
        raise invalid("model: stands in model_name; leave it out")
    try:
        return msgspec.convert(named, Fields, strict=False)
    except msgspec.ValidationError as error:
        raise undecodable(error) from error
