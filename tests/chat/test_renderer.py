"""Templates are rendered where they can be stopped: ten that never end are ended, and harm nobody."""

import asyncio
import os
import resource
import time
from pathlib import Path

import pytest

from serving.chat.renderer import Renderer, RenderError

GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge string": "{{ 'x' * 10**12 }}",
    "a string that grows": "{% set ns = namespace(x='x') %}{% for i in range(60) "
    "%}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a list that grows": "{% set ns = namespace(x=[1]) %}{% for i in range(60) "
    "%}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a macro without end": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a huge number": "{{ 10**(10**9) }}",
    "a wide format": "{{ '%1000000000000d' % 1 }}",
    "much text": "{% for a in range(9999) %}{% for b in range(9999) "
    "%}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "a slow filter": "{{ range(99999) | map('string') | join('x' * 9999) | wordcount }}",
    "a deep source": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


def request(source, text="hi"):
    messages = [{"role": "user", "content": text}]
    return {
        "source": source,
        "special_tokens": {},
        "added": {},
        "control": None,
        "conversation": {"messages": messages},
    }


def run(work):
    async def with_renderer():
        renderer = Renderer()
        try:
            return await work(renderer)
        finally:
            await renderer.close()

    return asyncio.run(with_renderer())


def test_hostile_templates_end_and_harm_nobody():
    async def work(renderer):
        async def hostile(source):
            begin = time.monotonic()
            with pytest.raises(RenderError) as caught:
                await renderer.render(request(source))
            return time.monotonic() - begin, caught.value

        async def good():
            texts = []
            for i in range(20):
                texts.append(await renderer.render(request(GOOD, str(i))))
                await asyncio.sleep(0.02)
            return texts

        await renderer.render(request(GOOD))
        ended, texts = await asyncio.gather(
            asyncio.gather(*(hostile(source) for source in HOSTILE.values())), good()
        )
        return ended, texts

    ended, texts = run(work)
    assert texts == [[(f"user: {i}\n", False)] for i in range(20)]
    # Ten processes share the machine with the test: each gets a second and what starting it takes.
    assert max(seconds for seconds, _ in ended) < 15
    assert not any(error.refused and "took longer" in str(error) for _, error in ended)


def cpu_seconds(pid: int) -> float:
    """Of a process that is there."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ended_cpu_seconds() -> float:
    """Of all processes of ours that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_alone_ends_within_a_second(name):
    """Of a processor's time: how long that takes depends on what else the machine does."""

    async def work(renderer):
        await renderer.render(request(GOOD))
        (process,) = renderer._idle
        started, ended = cpu_seconds(process.pid), ended_cpu_seconds()
        with pytest.raises(RenderError):
            await renderer.render(request(HOSTILE[name]))
        await asyncio.gather(*renderer._ending)
        if process.returncode is None:
            seconds = cpu_seconds(process.pid) - started
        else:
            seconds = ended_cpu_seconds() - ended - started
        assert await renderer.render(request(GOOD)) == [("user: hi\n", False)]
        return seconds

    assert run(work) < 1.0


def test_who_is_to_blame():
    async def work(renderer):
        found = []
        for source in (
            "{{ raise_exception('no') }}",
            "{% if %}",
            "{{ messages[3].x.y }}",
            "{{ ''.__class__.x }}",
        ):
            with pytest.raises(RenderError) as caught:
                await renderer.render(request(source))
            found.append((caught.value.refused, str(caught.value)))
        return found

    refused, syntax, undefined, unsafe = run(work)
    assert refused == (True, "messages: the model's chat template refuses them: no")
    assert not syntax[0] and "line 1" in syntax[1]
    assert undefined[0] and "refuses them" in undefined[1]
    assert not unsafe[0] and "unsafe" in unsafe[1]


def test_a_cancelled_call_leaves_no_answer_for_the_next():
    async def work(renderer):
        slow = request(
            "{% for a in range(9999) %}{% for b in range(99) %}{% endfor %}{% endfor %}slow"
        )
        task = asyncio.create_task(renderer.render(slow))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return [await renderer.render(request(GOOD, str(i))) for i in range(3)]

    assert run(work) == [[(f"user: {i}\n", False)] for i in range(3)]


def test_a_process_that_died_is_replaced():
    async def work(renderer):
        await renderer.render(request(GOOD))
        for process in renderer._idle:
            process.kill()
            await process.wait()
        return await renderer.render(request(GOOD))

    assert run(work) == [("user: hi\n", False)]


def test_answers_are_read_where_a_pattern_can_be_stopped():
    def asked(answer, **field):
        template = {"start_anchor": "A:", "fields": {"content": field}}
        named = {"response_template": template, "prompt": "A:", "answer": answer, "tools": []}
        return named | ({"response_template": 7} if field == {"x": 0} else {})

    async def work(renderer):
        message = await renderer.parse(asked(" hi "))
        found = []
        endless = {"close_pattern": "(a|aa)+[bc]"}
        large = {"transform": ["{content}"] * 20_000}
        for answer, field in (
            ("a" * 60, endless),
            ("{", {"content": "json"}),
            ("", {"x": 0}),
            ("a" * 1000, large),
        ):
            with pytest.raises(RenderError) as caught:
                await renderer.parse(asked(answer, **field))
            found.append(str(caught.value))
        return message, found, await renderer.render(request(GOOD))

    message, found, text = run(work)
    assert message == {"content": "hi"} and text == [("user: hi\n", False)]
    assert "stopped" in found[0] or "memory" in found[0]
    assert found[1].startswith("ResponseError: json: ")
    assert found[2] == "ResponseError: response_template: is int, not an object"
    assert found[3].startswith("it made a message of 20")
