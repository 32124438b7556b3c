"""A generated corpus for the tests of the text data modules."""

import random
from pathlib import Path

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "my", "xi"]


def write_corpus(root: Path, train: int = 200, valid: int = 20, test: int = 15, seed: int = 0) -> Path:
    """Writes {train,valid,test}.{en,de}: the "German" is the English with its words in capitals and turned round."""
    generator = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        sentences = [generator.choices(WORDS, k=generator.randint(2, 14)) for _ in range(count)]
        write_lines(root / f"{split}.en", [" ".join(words) for words in sentences])
        write_lines(root / f"{split}.de", [" ".join(reversed(words)).upper() for words in sentences])
    return root


def write_lines(path: Path, lines: list[str]) -> Path:
    """Writes lines that end in \\n on every system."""
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path
