"""From a request as it came to one the engine can run, or to an error that says what to change."""

import dataclasses
import math
from typing import Any

import grpc

from jblock.engine import api
from jblock.engine.scheduling.request_checks import LOGIT_BIAS, first_problem
from serving.errors import RequestError, invalid
from serving.served_models import ServedModel
from serving.tenants import Tenant
from serving.v1 import jblock_pb2 as pb

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 256
_MAX_STOP_IDS = 64
_MAX_SAMPLES = 16


async def prompt_ids(request: pb.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    """The ids of the prompt, encoded if it is text, and known to fit.

    Raises:
      RequestError: the prompt is missing, empty, too long or not of this vocabulary.
    """
    given = request.WhichOneof("prompt")
    most = model.info.max_model_len - 1
    if given == "text":
        if model.codec is None:
            raise invalid(f"text: {model.info.name} has no tokenizer; send token_ids")
        if not request.text:
            raise invalid("text: is empty; send at least one character")
        # Encoding megabytes takes seconds, in which other long prompts would wait.
        if len(request.text) > model.codec.most_characters(most):
            raise invalid(
                f"text: prompt has {len(request.text)} characters, {model.info.name} takes at most "
                f"{most} tokens; shorten it"
            )
        found = await model.codec.encode(request.text, most)
        if found is None:
            raise invalid(
                f"text: prompt has {len(request.text)} characters, which are more tokens than "
                f"{model.info.name} takes; it takes at most {most}; shorten it"
            )
        ids = found
        if not ids:
            raise invalid(f"text: {request.text[:40]!r} encodes to no token; send other text")
    elif given == "token_ids":
        ids = tuple(request.token_ids.ids)
        if not ids:
            raise invalid("token_ids: is empty; send at least one id")
    else:
        raise invalid("prompt: is missing; set text or token_ids")
    if len(ids) > most:
        raise invalid(
            f"{given}: prompt has {len(ids)} tokens, {model.info.name} takes at most {most}; "
            "shorten it"
        )
    if given == "token_ids":
        _check_ids("token_ids", ids, model.info)
    elif max(ids) >= model.info.vocab_size:  # Tokens added to a tokenizer, not to its model.
        raise invalid(
            f"text: encodes to the id {max(ids)}, {model.info.name} has ids from 0 to "
            f"{model.info.vocab_size - 1}; leave that token out"
        )
    return ids


def sampling_params(
    request: pb.GenerateRequest,
    model: ServedModel,
    prompt_tokens: int,
    default_max_tokens: int | None = None,
) -> api.SamplingParams:
    """The sampling fields, checked, with defaults for what was not set.

    Raises:
      RequestError: a field is out of its range.
    """
    default = api.SamplingParams()
    left = model.info.max_model_len - prompt_tokens
    most = default.max_tokens if default_max_tokens is None else default_max_tokens
    params = api.SamplingParams(
        temperature=_given(request, "temperature", default.temperature),
        top_k=_given(request, "top_k", default.top_k),
        top_p=_given(request, "top_p", default.top_p),
        min_p=_given(request, "min_p", default.min_p),
        repetition_penalty=_given(request, "repetition_penalty", default.repetition_penalty),
        presence_penalty=_given(request, "presence_penalty", default.presence_penalty),
        frequency_penalty=_given(request, "frequency_penalty", default.frequency_penalty),
        logit_bias=tuple(sorted(request.logit_bias.items())),
        seed=_given(request, "seed", None),
        max_tokens=_given(request, "max_tokens", min(most, left)),
        min_tokens=_given(request, "min_tokens", default.min_tokens),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs or request.top_logprobs > 0,
        top_logprobs=_given(request, "top_logprobs", default.top_logprobs),
        prompt_logprobs=request.prompt_logprobs,
    )
    _check_drawing(params)
    _check_bias(params, model.info)
    if params.max_tokens < 1:
        raise invalid(f"max_tokens: {params.max_tokens} is below 1; ask for at least one token")
    if params.max_tokens > left:
        raise invalid(
            f"max_tokens: {params.max_tokens} is more than the {left} tokens that "
            f"{model.info.name} has left after {prompt_tokens} of prompt; ask for fewer, "
            "or leave it unset"
        )
    if not 0 <= params.min_tokens <= params.max_tokens:
        raise invalid(
            f"min_tokens: {params.min_tokens} is outside 0 to max_tokens, {params.max_tokens}; "
            "0 lets the model end when it will"
        )
    if len(params.stop_token_ids) > _MAX_STOP_IDS:
        raise invalid(
            f"stop_token_ids: {len(params.stop_token_ids)} ids are more than {_MAX_STOP_IDS}; "
            "send fewer"
        )
    _check_ids("stop_token_ids", params.stop_token_ids, model.info)
    return params


def resumed_ids(
    request: pb.GenerateRequest, model: ServedModel, params: api.SamplingParams
) -> tuple[int, ...]:
    """What was delivered of the answer before.

    Raises:
      RequestError: it is of no answer to this request, or of another version of the model.
    """
    if not request.HasField("resume"):
        return ()
    ids, version = tuple(request.resume.token_ids), request.resume.model_version
    if request.n > 1:
        raise invalid(f"resume: is of one answer, and n is {request.n}; send a request for each")
    if version not in (0, model.info.version):
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"resume.model_version: {version} is not served any more, {model.info.name} is in version "
            f"{model.info.version}; ask anew without resume",
        )
    if len(ids) > params.max_tokens:
        raise invalid(
            f"resume.token_ids: {len(ids)} ids are more than max_tokens, {params.max_tokens}; send those "
            "that were delivered"
        )
    _check_ids("resume.token_ids", ids, model.info)
    return ids


def within_limits(
    request: pb.GenerateRequest, params: api.SamplingParams, prompt_tokens: int, tenant: Tenant
) -> api.SamplingParams:
    """The parameters as a tenant may have them: an answer whose length was not given is shortened.

    Raises:
      RequestError: the prompt, or the length that was given, is over the tenant's limit.
    """
    most = tenant.max_prompt_tokens
    if most is not None and prompt_tokens > most:
        raise invalid(
            f"prompt: has {prompt_tokens} tokens, and tenant {tenant.name} may send {most}; shorten it"
        )
    most = tenant.max_output_tokens
    if most is None or params.max_tokens <= most:
        return params
    if request.HasField("max_tokens") or params.min_tokens > most:
        field = "max_tokens" if request.HasField("max_tokens") else "min_tokens"
        raise invalid(
            f"{field}: {getattr(params, field)} is more than the {most} tokens that tenant {tenant.name} "
            "may ask for; ask for fewer"
        )
    return dataclasses.replace(params, max_tokens=most)


def priority_of(request: pb.GenerateRequest, tenant: Tenant) -> int:
    """How urgent it is; lower numbers go first.

    Raises:
      RequestError: it is more urgent than the tenant may ask for.
    """
    priority = _given(request, "priority", max(0, tenant.priority_ceiling))
    if priority < tenant.priority_ceiling:
        raise invalid(
            f"priority: {priority} is more urgent than {tenant.priority_ceiling}, the most that tenant "
            f"{tenant.name} may ask for; ask for that or a higher number"
        )
    return priority


def num_samples(request: pb.GenerateRequest) -> int:
    """How many answers are wanted.

    Raises:
      RequestError: none, or too many.
    """
    count = _given(request, "n", 1)
    if not 1 <= count <= _MAX_SAMPLES:
        raise invalid(f"n: {count} is outside 1 to {_MAX_SAMPLES}; send several requests for more")
    return count


def stop_strings(request: pb.GenerateRequest, model: ServedModel) -> tuple[str, ...]:
    """The stop strings, checked.

    Raises:
      RequestError: one is empty or too long, or they are too many.
    """
    stops = tuple(request.stop)
    if stops and model.codec is None:
        raise invalid(f"stop: {model.info.name} has no tokenizer; use stop_token_ids")
    if len(stops) > _MAX_STOPS:
        raise invalid(f"stop: {len(stops)} strings are more than {_MAX_STOPS}; send fewer")
    for at, stop in enumerate(stops):
        if not stop:
            raise invalid(f"stop[{at}]: is empty; leave it out")
        if len(stop) > _MAX_STOP_LENGTH:
            raise invalid(
                f"stop[{at}]: has {len(stop)} characters, at most {_MAX_STOP_LENGTH} are taken; "
                "shorten it"
            )
    return stops


def check_policy(request: pb.GenerateRequest, info: api.ModelInfo) -> None:
    """Whether the request accepts what the model is. Each policy allows those before it too.

    Raises:
      RequestError: the model is less exact than what was asked for, or the policy is none.
    """
    if request.policy not in pb.Policy.values():
        raise invalid(f"policy: {request.policy} is no policy; leave it unset for POLICY_EXACT")
    accepted = max(request.policy, pb.POLICY_EXACT)
    needed = pb.Policy.Value(f"POLICY_{info.policy.upper()}")
    if needed > accepted:
        raise invalid(
            f"policy: model {info.name!r} is {pb.Policy.Name(needed)}, which the request does not "
            "accept; set policy to it, or ask the model it was made from"
        )


def accepted(request: pb.GenerateRequest) -> tuple[str, float | None]:
    """The policy that a request accepts, and how much measured damage; None: what the server allows.

    Raises:
      RequestError: the damage is no number that there could be.
    """
    policy = pb.Policy.Name(max(request.policy, pb.POLICY_EXACT)).removeprefix("POLICY_").lower()
    damage = _given(request, "max_damage", None)
    if damage is not None and not 0 <= damage < math.inf:
        raise invalid(
            f"max_damage: {damage} is no finite number >= 0; leave it out for the server's"
        )
    return policy, damage


def _check_drawing(params: api.SamplingParams) -> None:
    """The ranges of what shapes the distribution."""
    if wrong := first_problem(params):
        field, allowed = wrong
        value = getattr(params, field)
        raise invalid(f"{field}: {value} {allowed.problem(value)}; {allowed.remedy}")


def _check_bias(params: api.SamplingParams, info: api.ModelInfo) -> None:
    if len(params.logit_bias) > api.MAX_LOGIT_BIAS:
        raise invalid(
            f"logit_bias: {len(params.logit_bias)} ids are more than {api.MAX_LOGIT_BIAS}; "
            "send fewer"
        )
    for token_id, value in params.logit_bias:
        if not 0 <= token_id < info.vocab_size:
            raise invalid(
                f"logit_bias[{token_id}]: is no token id of {info.name}; ids go from 0 to "
                f"{info.vocab_size - 1}"
            )
        if wrong := LOGIT_BIAS.problem(value):
            raise invalid(f"logit_bias[{token_id}]: {value} {wrong}; {LOGIT_BIAS.remedy}")


def _given(request: pb.GenerateRequest, field: str, default: Any) -> Any:
    return getattr(request, field) if request.HasField(field) else default


def _check_ids(field: str, ids: tuple[int, ...], info: api.ModelInfo) -> None:
    for at, token_id in enumerate(ids):
        if not 0 <= token_id < info.vocab_size:
            raise invalid(
                f"{field}[{at}]: {token_id} is no token id of {info.name}; "
                f"ids go from 0 to {info.vocab_size - 1}"
            )
