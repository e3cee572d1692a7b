"""What inference gateways and vLLM's tools ask of a server: metrics by vLLM's names, adapters over HTTP."""

import contextlib

import pytest
import server_harness as harness
from http_harness import ask, raw
from test_lifecycle import scrape


@contextlib.contextmanager
def serving(folder, **config):
    engine = harness.mock(folder, step_delay=0.01)
    with harness.serving(engine, http_port=0, metrics_port=0, **config) as running:
        yield running


@pytest.mark.parametrize(("names", "prefix"), [("jblock", "jblock_"), ("vllm", "vllm:")])
def test_gauges_for_gateways(tmp_path, names, prefix):
    with serving(tmp_path, metrics_names=names) as running:
        body = {"model": "adapter", "prompt": [300], "max_tokens": 500, "stream": True}
        with raw(running.server.http_port, "/v1/completions", body) as one:
            assert one.recv(4096)
            values = scrape(running.server.metrics_port)
            assert values[f"{prefix}num_requests_running"] == "1.0"
            assert values[f"{prefix}num_requests_waiting"] == "0.0"
            assert 0 < float(values[f"{prefix}kv_cache_usage_perc"]) < 1
            (lora,) = [key for key in values if key.startswith(f"{prefix}lora_requests_info")]
            assert 'running_lora_adapters="adapter"' in lora
        assert harness.eventually(running.is_empty)
        (lora,) = [
            key
            for key in scrape(running.server.metrics_port)
            if key.startswith(f"{prefix}lora_requests_info")
        ]
        assert 'running_lora_adapters=""' in lora
        assert running.client.generate("echo", [300, 301], max_tokens=2)
        values = scrape(running.server.metrics_port)
        assert values[f'{prefix}time_to_first_token_seconds_count{{model="echo"}}'] == "1.0"
        assert ("vllm:prompt_tokens_total" in values) == (names == "vllm")
        assert "jblock_steps_total" in values  # What is not vLLM's keeps its name.


def test_adapters_come_and_go_in_vllms_form(tmp_path):
    with serving(tmp_path) as running:
        port = running.server.http_port
        gone = ask(port, "/v1/unload_lora_adapter", {"lora_name": "adapter"})
        assert gone.status == 200
        body = {"model": "adapter", "prompt": [300], "max_tokens": 1}
        assert ask(port, "/v1/completions", body).status == 404
        back = ask(port, "/v1/load_lora_adapter", {"lora_name": "adapter"})
        assert back.status == 200
        assert ask(port, "/v1/completions", body).status == 200
        path = {"lora_name": "other", "lora_path": "/etc"}
        assert ask(port, "/v1/load_lora_adapter", path).error["param"] == "lora_path"
        assert ask(port, "/v1/load_lora_adapter", {"lora_name": "nobody"}).status == 404


def test_only_admins_change_what_is_served(tmp_path):
    import hashlib

    from serving.tenants import Tenant, Tenants

    tenants = Tenants([(hashlib.sha256(b"key").digest(), Tenant(name="acme"))])
    with serving(tmp_path, tenants=tenants) as running:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            answer = ask(running.server.http_port, path, {"lora_name": "adapter"}, key="key")
            assert answer.status == 403
