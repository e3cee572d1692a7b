"""What `--help` of `jblock convert` tells."""

ABOUT = """\
Fills a zoo with models, shows what they share, checks it, and gives them back.

A zoo is a folder that keeps every part of every model once. Begin with

  {program} hf CHECKPOINT --zoo ZOO
  {program} inspect --zoo ZOO

`{program} COMMAND --help` tells more. With --json a command prints one JSON object and nothing
else on stdout. Exit codes: 0 done, 1 `verify` or `fsck` found something, 2 bad input (no model of the
zoo has changed).
"""
FIELDS = {
    "src": "a folder with config.json and safetensors weights, or org/name[@revision] on the Hugging Face "
    "Hub; several may be given",
    "gguf": "a GGUF file, or org/name/FILE[@revision] on the Hub; several may be given",
    "orbax": "a folder that orbax wrote, with config.json in it or beside it; several may be given",
    "adapter": "a folder with adapter_config.json and safetensors weights, or org/name[@revision] on the "
    "Hub; several may be given",
    "name": "a model in the zoo; where it makes sense also name@version",
    "a": "a model, as name or name@version",
    "b": "another model, or another version of the same",
    "lower": "the model that gives the lower layers",
    "upper": "the model that gives the upper layers, of the same tokenizer",
    "--name": "name the model gets in the zoo",
    "--base": "the model in the zoo that the adapter was trained on; name or name@version",
    "--against": "what it was made from: a folder, a GGUF file, or a name on the Hub",
    "--out": "folder to write, new or empty",
    "--to": "folder or URL of the other zoo; made when absent",
}
# Other spellings a command is known by.
ALIASES = {"quantize": ("quantise",)}
# Command -> what a newcomer should know, and an example.
MORE = {
    "compress": (
        "Every changed attention, ffn and expert becomes the base's component and a delta: low rank in 8\n"
        "bits, or codes of 1, 2 or 4 bits; each gets the codec that buys most within the budget. Biases\n"
        "and norms are kept exactly. The copy has policy `near`; it shares the base's weights and matmuls.\n"
        "With --text what it costs is measured from end to end and kept as an edge.",
        "compress my-finetune --base llama --budget 0.125 --text held-out.txt --items items.jsonl \\\n"
        "    --zoo ./zoo",
    ),
    "measure": (
        "Both are put through the text and the items of OTHER. KL, top-1, perplexity and items, with their\n"
        "intervals, become an edge, which is held against --policy and --threshold here and in list --edges.",
        "measure my-finetune-small --against my-finetune --text held-out.txt --items items.jsonl \\\n"
        "    --policy near --threshold accuracy_change=0.005 --zoo ./zoo",
    ),
    "quantize": (
        "Attentions, ffns and experts get weights of 4 or 8 bits with a scale a group; norms, routers and\n"
        "both embeddings stay. The copy is a model of its own with policy `near`: it is served only where\n"
        "it is named, to requests that accept that. Edges tell how far each component is from its original\n"
        "and, with --text, what all of them cost from end to end.",
        "quantize llama --zoo ./zoo --bits 4 --group 64 --text held-out.txt",
    ),
    "hf": (
        "Each checkpoint is cut into components; those that the zoo has already are not stored again. What\n"
        "is on the Hub is downloaded first, to the cache of huggingface_hub (HF_HOME, HF_TOKEN,\n"
        "HF_HUB_OFFLINE). Killed, it goes on where it was when it is called again. An equal checkpoint\n"
        "under the same name is no new version.",
        "hf ./llama-3.2-1b HuggingFaceTB/SmolLM2-135M@main --zoo ./zoo --name llama --name smol",
    ),
    "gguf": (
        "F32, F16 and BF16 stay what they are; quantized weights (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K,\n"
        "Q6_K) become the float32 values they stand for. Tokenizer and chat template come from the file. Of\n"
        "a model in several parts, give the first. `export` writes it as a Hugging Face checkpoint.",
        "gguf ./SmolLM2-135M-Instruct.Q4_1.gguf --zoo ./zoo --name smol",
    ),
    "orbax": (
        "Parameters as Flax NNX and MaxText lay them out, and the config.json of the model they were tuned\n"
        "from: docs/converting.md has the names. Tokenizer files are read from where config.json is.",
        "orbax ./my-run/checkpoints/1000 --zoo ./zoo --name mine",
    ),
    "peft": (
        "The adapter rides on the components of its base, which must be in the zoo and may be an adapter\n"
        "itself. LoRA, DoRA, (IA)3, biases, norms, whole modules, prompts and prefixes as PEFT saves them,\n"
        "bottlenecks as AdapterHub's library does (save_adapter with use_safetensors=True).",
        "peft ./my-adapter --zoo ./zoo --base llama --name my-llama",
    ),
    "merge": (
        "cat puts the adapters' ranks side by side, so that their weighted effects add up; linear adds\n"
        "their matrices instead, as PEFT does, for equal ranks. All must be on the same base.",
        "merge --zoo ./zoo --name both --adapter mine=0.7 --adapter yours=0.3",
    ),
    "plan": (
        "Writes nothing. Tells how much would be stored, what is shared with which models, and into how\n"
        "many blocks the model would be cut; with --details each component, each cut and its reason. With\n"
        "--base, for an adapter.",
        "plan ./my-finetune --zoo ./zoo --name mine",
    ),
    "list": (
        "`logical` is what separate checkpoints would take, `own` what only that model uses. With --edges:\n"
        "what was measured of substitutes, and which of them --policy and --threshold allow.",
        "list --edges --policy near --threshold kl=0.01 --zoo ./zoo",
    ),
    "inspect": (
        "Tells what a model stores of its own, what it shares with which others, and its blocks; with\n"
        "--details each component. Without a name: the whole zoo.",
        "inspect my-llama --zoo ./zoo",
    ),
    "diff": (
        "Components are equal (stored once), changed (with the largest difference of two elements and\n"
        "the tensor that has it), or of another form.",
        "diff llama my-llama --zoo ./zoo",
    ),
    "verify": (
        "Reads both sides in full. Exit code 1 and one line for each difference.",
        "verify llama --against ./llama-3.2-1b --zoo ./zoo",
    ),
    "export": (
        "Weights, shards, index, config and tokenizer come back identical to the last byte; an adapter\n"
        "as a PEFT adapter, without its base.",
        "export llama@1 --out ./llama-again --zoo ./zoo",
    ),
    "profile": (
        "Runs every kind of block on the grids the engine decodes and prefills with, and keeps the times in\n"
        "the zoo. From then on blocks are cut by what a hand-over costs here. Give the machine some quiet.",
        "profile llama --zoo ./zoo",
    ),
    "copy": (
        "Only components the other zoo lacks are sent; an adapter takes its base along, which does not\n"
        "become active there. NAME becomes active there, NAME@VERSION only if it is so here. Interrupted,\n"
        "it goes on where it was when it is called again.",
        "copy my-llama --zoo ./zoo --to /mnt/other/zoo",
    ),
    "equivalence": (
        "Finds components with parameters that point the same way, without comparing all pairs. With --text\n"
        "each is put in the place of the other and measured from end to end, as are models of other widths;\n"
        "the scores become edges. What --policy and --threshold allow is chosen on one half of the text and\n"
        "items and recommended if the other half confirms it; with --suffix as models of policy near.",
        "equivalence --text held-out.txt --items mine=items.jsonl --policy near \\\n"
        "    --threshold accuracy_change=0.005 --zoo ./zoo",
    ),
    "stitch": (
        "Trains a small component between the frozen layers of both, on the text and on what the better of\n"
        "the two makes of it. Several --at give one stitch that is told how deep it stands, and a model for\n"
        "each. Policy adaptive: served only where named, to requests that accept it. Killed, it goes on\n"
        "when called again.",
        "stitch small large --at 2:2 --name joined --train train.txt --text held-out.txt --zoo ./zoo",
    ),
    "surrogate": (
        "Removes the least important heads and channels of some layers and trains what is left to give the\n"
        "model's own outputs. Policy adaptive, like stitch. Killed, it goes on when called again.",
        "surrogate mine --layers 4:6 --as mine-small --train train.txt --train_items train.jsonl \\\n"
        "    --text held-out.txt --items items.jsonl --zoo ./zoo",
    ),
    "activate": (
        "From then on NAME alone stands for that version: servers take it up when they load the model. The\n"
        "one before stays, and `rollback` goes back to it.",
        "activate my-llama@3 --zoo ./zoo",
    ),
    "rollback": (
        "Goes back to the version that was active before, as `history` lists them; a version that was\n"
        "removed is passed over.",
        "rollback my-llama --zoo ./zoo",
    ),
    "alias": (
        "NAME@ALIAS can be given wherever NAME@VERSION can. An alias names one version at a time; giving\n"
        "it to another one moves it.",
        "alias my-llama@3 stable --zoo ./zoo",
    ),
    "history": (
        "Additions with their digest, and with the source, its revision and its license as far as they are\n"
        "known; activations, aliases and removals. Numbers of removed versions are not given again.",
        "history my-llama --zoo ./zoo",
    ),
    "rm": (
        "Refused while an adapter or an edge relies on it. The components stay until `gc --delete`. With\n"
        "--edge in place of a name it removes an edge.",
        "rm my-llama --zoo ./zoo",
    ),
    "gc": (
        "What no model (in any version), edge, running command or unfinished conversion of the last day\n"
        "names. Safe beside running converters.",
        "gc --zoo ./zoo --delete",
    ),
    "fsck": (
        "Exit code 1 and one line for each problem. --repair moves what is damaged, and versions that lack\n"
        "it, to quarantine/; converting such a model again brings both back.",
        "fsck --zoo ./zoo --repair",
    ),
}
