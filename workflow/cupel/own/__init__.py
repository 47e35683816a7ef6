"""A network of the user: read it, purify it, measure it, write it in its own form.

    network   the wrapper that defences see, its parts found in one pass
    imports   architectures by name or file, checkpoints in their authors' form
    normalisations  what is done to pixels before the network
    data      clean images from folders, arrays, prepared data sets
    evidence  what can be seen without the trigger
    language  a language model: adapters and answers
    suspect   what the user names, opened
    run       all of it in one call; `page` the report, `cli` the command
    grid      many of them, from one YAML, in parts that one process or many may do
"""

#: run where none are named, cheapest first: pruning without training, then with, then tuning, then IMS
USUAL = ("clp", "bnp", "rnp", "fst", "ims")
#: what is measured, for people
LABELS = {"acc": "ACC", "agreement": "agreement", "asr": "ASR", "ra": "RA", "reversed": "reversed trigger"}


def device_of(asked: str) -> str:
    """`cpu` or `cuda`, as a user asks for it, or `auto`.

    Raises:
        ValueError: `cuda` where torch sees none.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda is asked for, but torch {torch.__version__} sees no CUDA device; use auto or cpu")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
