"""Vision-language models: LLaVA and InternVL of transformers, from a folder or the hub.

Processing differs from the processors' own defaults in two points (bye SPEC 4, 11.2): LLaVA pads images to a square
instead of cutting them, and InternVL sees one tile (`crop_to_patches=False`).
"""

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cupel.compat import ensure_torchvision
from cupel.files import read_json, reading, scratch, write_json
from cupel.hub import ModelUnavailable, snapshot
from cupel.training.engine import finite_outputs

ensure_torchvision()
from transformers import (  # noqa: E402
    AutoProcessor,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
)

CLASSES = {"llava": LlavaForConditionalGeneration, "internvl": InternVLForConditionalGeneration}

#: files of a repository that are read; weights only as safetensors, code never
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass
class VisionLanguageModel:
    """A network with its processor.

    Attributes:
        network: `LlavaForConditionalGeneration` or `InternVLForConditionalGeneration`.
        processor: its processor, with the image settings of this module.
        source: JSON-able record of where it came from.
    """

    network: nn.Module
    processor: object
    source: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.kind == "llava":
            settings = self.processor.image_processor.to_dict()
            kept = {k: settings[k] for k in ("size", "crop_size", "image_mean", "image_std", "resample") if settings.get(k)}
            self.processor.image_processor = LlavaImageProcessor(**kept, do_pad=True)
        else:
            self.processor.image_processor.crop_to_patches = False
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def kind(self) -> str:
        """`llava` or `internvl`."""
        return self.network.config.model_type

    @property
    def tokenizer(self):
        """Of the processor."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers of the language model."""
        return self.network.model.language_model.layers

    @property
    def image_tokens(self) -> int:
        """Image tokens T per image."""
        return self.network.config.image_seq_length

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the vision tower sees, in pixels."""
        processor = self.processor.image_processor
        size = processor.crop_size if self.kind == "llava" else processor.size
        return int(size["height"]), int(size["width"])

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised pixel values of the network's dtype, of uint8 [B, 3, H, W] as given by `Encoder`."""
        processor = self.processor.image_processor
        mean = torch.tensor(processor.image_mean, device=images.device)[:, None, None]
        std = torch.tensor(processor.image_std, device=images.device)[:, None, None]
        return ((images.float() / 255 - mean) / std).to(self.network.dtype)

    def prompt(self, question: str) -> str:
        """An image and a question by the chat template, from the start to the assistant's role marker."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> VisionLanguageModel:
    """A model from a folder in the form of the hub (or written by `save`), in eval mode.

    Raises:
        ModelUnavailable: something is missing, or the weights are not safetensors.
        Damaged: a file cannot be read.
        ValueError: it is neither LLaVA nor InternVL.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"{folder} holds no model: config.json is missing")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{folder}/config.json: model_type is {kind!r}, but only {' and '.join(CLASSES)} are supported")
    if not any(folder.glob("*.safetensors")):
        raise ModelUnavailable(f"{folder} has no *.safetensors; other formats are not read (they can run code when opened)")
    with reading(folder):
        network = CLASSES[kind].from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)
        processor = AutoProcessor.from_pretrained(folder)
    source = read_json(folder / "cupel.json") if (folder / "cupel.json").is_file() else {"folder": folder.name}
    return VisionLanguageModel(network.to(device).eval(), processor, source)


def save(model: VisionLanguageModel, folder: str | Path) -> None:
    """Write weights (safetensors), configuration, tokenizer and processor as a folder that is complete or absent."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(folder.parent, f".{folder.name}.") as temporary:
        temporary.chmod(0o755)
        model.network.save_pretrained(temporary)
        model.processor.save_pretrained(temporary)
        write_json(temporary / "cupel.json", model.source)
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def load_hub(repository: str, revision: str = "main", *, dtype: torch.dtype = torch.bfloat16,
             device: str | torch.device = "cpu") -> VisionLanguageModel:
    """A model of the hub. Weights come as safetensors; no remote code is run.

    The commit found is recorded in `source`.

    Raises:
        ModelUnavailable: see `cupel.hub.snapshot`.
        ValueError: it is neither LLaVA nor InternVL.
    """
    folder = snapshot(repository, revision, FILES)
    model = load(folder, dtype=dtype, device=device)
    model.source = {"repository": repository, "revision": folder.name}
    return model


def sample_bytes(model: VisionLanguageModel, length: int) -> int:
    """Rough peak of activations of one sample in a forward pass without attention maps, in bytes."""
    text, vision = model.network.config.text_config, model.network.config.vision_config
    size = torch.finfo(model.network.dtype).bits // 8
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    patches = (model.image_size[0] // patch) * (model.image_size[1] // patch) + 1
    language = length * (8 * text.hidden_size + 3 * text.intermediate_size)
    tower = patches * (8 * vision.hidden_size + 3 * vision.intermediate_size + vision.num_hidden_layers * vision.hidden_size)
    return 2 * size * max(language, tower)


def fitting_batch(model: VisionLanguageModel, length: int, largest: int = 256) -> int:
    """Samples per forward pass that a third of the free memory holds, at least 1."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(np.clip(free // 3 // sample_bytes(model, length), 1, largest))


@contextlib.contextmanager
def inference(model: VisionLanguageModel):
    """Eval mode without gradients, in which outputs that are not finite raise `Diverged`."""
    was = model.network.training
    model.network.eval()
    try:
        with torch.inference_mode(), finite_outputs(model.network):
            yield
    finally:
        model.network.train(was)
