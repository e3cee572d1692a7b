"""Real vocabularies: GGUF files of llama.cpp with the ids that the models' own tokenizers give 47 texts.

Long: it downloads the sdist of llama-cpp-python, which has them, and is skipped, and says why, where the
package index does not have it.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tokenizers

from checkpoints.gguf.file import read_gguf
from checkpoints.gguf.tokenizer import tokenizer

pytestmark = pytest.mark.long

SDIST = "llama-cpp-python==0.3.36"
# Vocabulary -> the architecture of a model that has it.
VOCABULARIES = {
    "llama-bpe": "llama",
    "llama-spm": "llama",
    "qwen2": "qwen2",
    "gpt-2": "llama",
    "starcoder": "llama",
    "refact": "llama",
    "command-r": "llama",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The folder of the vocabularies."""
    folder = tmp_path_factory.mktemp("sdist")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d"]
    got = subprocess.run([*pip, str(folder), SDIST], capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"{SDIST} is not to be had here: {got.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        members = [m for m in archive.getmembers() if "/models/ggml-vocab-" in m.name]
        archive.extractall(folder, members, filter="data")
    (found,) = folder.glob("*/vendor/llama.cpp/models")
    return found


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_the_models_own_tokenizer(name, models):
    path = models / f"ggml-vocab-{name}.gguf"
    found = tokenizer(read_gguf(path).metadata, VOCABULARIES[name], path)
    made = tokenizers.Tokenizer.from_str(found.files["tokenizer.json"].decode())
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        wanted = [int(id_) for id_ in line.split()]
        assert made.encode(text, add_special_tokens=False).ids == wanted, text
