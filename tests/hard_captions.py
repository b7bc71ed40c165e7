"""Captions on which readers of prompts differ: brackets, escapes, long ones, and what tokenizers split in their way."""

import random

HARD_CAPTIONS = [
    "",
    " ",
    "a red circle left on a blue background",
    "(red)",
    "((red))",
    "(red:1.5)",
    "a (red:1.5) circle, (blue:0.25) ground",
    "(a (red:1.5) circle:0.5)",
    "((a:1.2) b)",
    "(red:0)",
    "(red:-1)",
    "(red:1e-1)",
    "(red: 1.5 )",
    "(red:very)",
    "(a:b:1.5)",
    "(:1.5)",
    "()",
    "(())",
    "a () b",
    "artist_\\(style\\), 1girl",
    "(artist_\\(style\\):1.3), solo",
    "artist_(style), looking at viewer",
    "open ( only",
    "closed ) only",
    "closed ) first, then (red:1.5), (blue:0.5)",
    "((one missing:1.3)",
    "(red:1.2)(blue:0.8)",
    "[red] {blue} <lora:style:0.8>",
    "a\nb\tc",
    "naïve café, ÀÉÎ, straße",
    "猫と犬, 赤い丸",
    "🦊🦊 fox 👩‍👩‍👧",
    "it's the dogs' they'll; don't!!! ... --- 3.14159 1girl 2boys",
    "A VERY LOUD CAPTION & <b>html</b> &amp; <|endoftext|> <|startoftext|>",
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 8,
    "word " * 75,
    "word " * 76,
    "(word :1.2)" * 100,
    "a short tag, " * 9 + "(seven tokens at the end of it:1.1), " * 12,
    ", ".join(f"(tag number {n}:{1 + n / 50:.2f})" for n in range(60)),
]


def random_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of brackets, escapes, numbers and words in any order."""
    draw = random.Random(seed)
    pieces = [
        "(",
        "(",
        ")",
        ")",
        "\\(",
        "\\)",
        ":",
        "1.5",
        ":0.5)",
        ":1.2)",
        " ",
        ",",
        "red",
        "a long word",
        "word " * 20,
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 40))) for _ in range(count)]
