"""Prompts for `bench speculate`: tasks whose answers repeat what they were given, and others."""

_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

_PASSAGES = (
    "The lighthouse keeper climbed the ninety-six steps every evening, carrying a can of oil and a clean "
    "cloth. He wiped the great lens until it shone, lit the lamp, and wrote the hour in his book. Ships far "
    "out at sea saw the beam and turned away from the rocks. In forty years he had missed only one night.",
    "A good loaf needs flour, water, salt and time. Mix the flour with the water and let it rest for an "
    "hour. Add the salt and the starter, fold the dough four times in two hours, and leave it overnight in "
    "a cold place. In the morning shape it, heat the oven until it is very hot, and bake it well.",
    "The river rises in the northern hills, passes three old mills and a paper factory, and reaches the "
    "plain near the market town of Harwell. From there it flows slowly to the east, past orchards and wide "
    "meadows, and after sixty miles it meets the sea at a harbor full of small white boats.",
    "Our office moves on the first of March. Please pack your desk in the boxes that stand in the corridor, "
    "write your name on each of them, and leave the keys with Martha at the front desk. The new address is "
    "14 Chapel Street, second floor. The telephone numbers stay as they are.",
)
_CODE = '''def read_table(path, separator=","):
    """Reads a table of numbers, a row a line."""
    rows = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            rows.append([float(cell) for cell in line.split(separator)])
    return rows
'''

_REPEAT = "Repeat the following text exactly, word for word:\n\n{}"

COPYING = (
    *(_CHAT.format(_REPEAT.format(text)) for text in _PASSAGES),
    f"# The first version:\n\n{_CODE}\n\n# The same function again, without a change:\n\n",
    _CHAT.format(f"Print this code again without any change:\n\n{_CODE}"),
)
PLAIN = tuple(
    _CHAT.format(question)
    for question in (
        "What is gravity?",
        "Why is the sky blue?",
        "How do I bake bread at home?",
        "Write a short story about a fox and a crow.",
        "Explain how a bicycle stays upright.",
        "What should I pack for a week in the mountains?",
        "Name three inventions of the nineteenth century and say what they changed.",
        "Write a letter to a friend about a day at the sea.",
    )
)
