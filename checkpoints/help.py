"""What `--help` of the converter's commands tells."""

FIELDS = {
    "src": "folder with config.json (hf) or adapter_config.json (peft) and safetensors weights",
    "name": "a model in the zoo; where it makes sense also name@version",
    "a": "a model, as name or name@version",
    "b": "another model, or another version of the same",
    "lower": "the model that gives the lower layers",
    "upper": "the model that gives the upper layers, of the same tokenizer",
    "--name": "name the model gets in the zoo",
    "--base": "name of the model in the zoo that the adapter was trained on",
    "--against": "folder of the checkpoint or adapter",
    "--out": "folder to write, new or empty",
    "--to": "folder of the other zoo; made when absent",
}
# Other spellings a command is known by.
ALIASES = {"quantize": ("quantise",)}
# Command -> what a newcomer should know, and an example.
MORE = {
    "compress": (
        "Every changed attention, ffn and expert becomes the base's component and a delta: low rank in 8\n"
        "bits, or codes of 1, 2 or 4 bits; each gets the codec that buys most within the budget. Biases\n"
        "and norms are kept exactly. The copy has policy `near`; it shares the base's weights and matmuls.",
        "compress my-finetune --base llama --budget 0.125 --zoo ./zoo",
    ),
    "quantize": (
        "Attentions, ffns and experts get weights of 4 or 8 bits with a scale a group; norms, routers and\n"
        "both embeddings stay. The copy is a model of its own with policy `near`: it is served only where\n"
        "it is named, to requests that accept that. Edges tell how far each component is from its original.",
        "quantize llama --zoo ./zoo --bits 4 --group 64",
    ),
    "hf": (
        "The checkpoint is cut into components; those that the zoo has already are not stored again.\n"
        "Killed, it goes on where it was when it is called again. An equal checkpoint under the same\n"
        "name is no new version.",
        "hf ./llama-3.2-1b --zoo ./zoo --name llama",
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
        "Writes nothing. Says for each component whether it would be stored or is shared, into which blocks\n"
        "the model would be cut, why there, and which models would be cut anew. With --base, for an adapter.",
        "plan ./my-finetune --zoo ./zoo --name mine",
    ),
    "list": (
        "`logical` is what separate checkpoints would take, `own` what only that model uses. With --edges:\n"
        "what was measured of substitutes, and which of them --policy and --threshold allow.",
        "list --edges --threshold top1_agreement=0.99 --zoo ./zoo",
    ),
    "inspect": (
        "Without a name: the whole zoo. Two models share a component when both are in `used by`.",
        "inspect my-llama --zoo ./zoo --json",
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
        "Only components the other zoo lacks are sent; an adapter takes its base along. Interrupted, it\n"
        "goes on where it was when it is called again.",
        "copy my-llama --zoo ./zoo --to /mnt/other/zoo",
    ),
    "equivalence": (
        "Finds components with parameters that point the same way, without comparing all pairs. With --text\n"
        "each is put in the place of the other and measured from end to end; the scores become edges. What\n"
        "--policy and --threshold allow together is recommended; with --suffix as models of policy near.",
        "equivalence --text held-out.txt --items mine=items.jsonl --policy near \\\n"
        "    --threshold accuracy_change=-0.005 --zoo ./zoo",
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
        "Exit code 1 and one line for each problem. --repair writes derived records anew and moves damaged\n"
        "components to damaged/, so that converting a model that uses them makes them again.",
        "fsck --zoo ./zoo --repair",
    ),
}
