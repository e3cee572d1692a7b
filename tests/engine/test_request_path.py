"""How many files a newcomer has to read to follow one request."""

import dataclasses
import sys
from pathlib import Path

from harness import SMALL, Agent, oracle, request

import jblock.engine

ENGINE = Path(jblock.engine.__file__).parent
MODEL = "llama_gqa_untied"


def files_of(*calls) -> set[str]:
    """Files of the engine in which any function ran."""
    seen: set[str] = set()

    def note(frame, event, argument):
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ENGINE):
                seen.add(path.relative_to(ENGINE).as_posix())

    sys.setprofile(note)
    try:
        for call in calls:
            call()
    finally:
        sys.setprofile(None)
    return seen


def test_submit_and_a_decode_step_pass_few_files(zoo):
    # Drafts, which nobody has to know of to follow a request, are a room of their own.
    agent = Agent.make(zoo, [MODEL], dataclasses.replace(SMALL, max_draft_tokens=0))
    prompt = oracle(MODEL)["prompt"][:20]
    agent.loop.submit(request("first", MODEL, prompt))
    while not any(o.token_ids for o in agent.loop.step()):
        pass
    agent.loop.step()
    decode = files_of(agent.loop.step)
    submit = files_of(lambda: agent.loop.submit(request("second", MODEL, prompt)))
    both = sorted(submit | decode)
    assert len(both) <= 15, "\n".join(both)
