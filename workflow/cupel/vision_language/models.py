"""Vision-language models (LLaVA and InternVL of transformers) and the encoder that makes batches for them.

Whatever the size, a model here is a `VisionLanguageModel`: network, processor, and where it came from. Models of the hub
are named in `HUB` (bye SPEC 5, 11.2, 11.3); those that are built here (`tiny_llava`, `smollm2_llava`) are ordinary
`LlavaForConditionalGeneration` networks, saved in the same form and used through the same code.

Processing differs from the processors' own defaults in two points (bye SPEC 4, 11.2): LLaVA pads images to a square
instead of cutting them, and InternVL sees one tile (`crop_to_patches=False`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cupel.compat import ensure_torchvision
from cupel.files import read_json, write_json
from cupel.rng import derive, rng
from cupel.vision_language.data import Samples, read_picture

ensure_torchvision()
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CLASSES = {"llava": LlavaForConditionalGeneration, "internvl": InternVLForConditionalGeneration}

#: files of a repository that are read; weights only as safetensors, code never
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")

IMAGE = "<image>"
_QUESTION = "\ufffcquestion\ufffc"  # stands for the question while a chat template is rendered


class NoModel(RuntimeError):
    """A model could not be had; the text says which, why, and what to do."""


@dataclass(frozen=True)
class HubModel:
    """A repository of the hub.

    Attributes:
        repository: `owner/name`.
        kind: `llava` or `internvl`.
        layers: decoder layers, where bye SPEC 5 or 11.3 names them.
        image_tokens: per image.
        note: what it is for.
    """

    repository: str
    kind: str
    layers: int | None
    image_tokens: int
    note: str


#: models of bye SPEC 5 and 11.3; any other repository of the two classes can be given by its id
HUB = {
    "llava_1_5_7b": HubModel("llava-hf/llava-1.5-7b-hf", "llava", 32, 576, "paper; native port of liuhaotian/llava-v1.5-7b"),
    "internvl2_5_2b_mpo": HubModel("OpenGVLab/InternVL2_5-2B-MPO-hf", "internvl", None, 256,
                                   "native port nearest to the paper's InternVL2.5-8B, for which none was found"),
    "internvl3_1b": HubModel("OpenGVLab/InternVL3-1B-hf", "internvl", None, 256, "small pretrained stand-in"),
}


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
        if self.kind not in CLASSES:
            raise ValueError(f"a model of type {self.kind!r} is not supported: only {' and '.join(CLASSES)} "
                             "(native classes of transformers) are")
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

    def to(self, device: str | torch.device) -> "VisionLanguageModel":
        """Move the network; returns the model."""
        self.network.to(device)
        return self


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
         attention: str = "sdpa") -> VisionLanguageModel:
    """A model from a folder in the form of the hub (or written by `save`), in eval mode.

    Args:
        folder: with config.json, *.safetensors, tokenizer and processor files.
        dtype: of the weights.
        device: where to put them.
        attention: implementation of attention; `eager` gives full maps, for comparison.

    Raises:
        NoModel: something is missing, or the weights are not safetensors.
        ValueError: it is neither LLaVA nor InternVL.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise NoModel(f"{folder} holds no model: config.json is missing")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{folder}/config.json: model_type is {kind!r}, but only {' and '.join(CLASSES)} are supported")
    if not any(folder.glob("*.safetensors")):
        raise NoModel(f"{folder} has no *.safetensors; other weight formats are not read (they can run code when opened)")
    network = CLASSES[kind].from_pretrained(folder, dtype=dtype, attn_implementation=attention, use_safetensors=True)
    processor = AutoProcessor.from_pretrained(folder)
    source = read_json(folder / "cupel.json") if (folder / "cupel.json").is_file() else {"folder": folder.name}
    return VisionLanguageModel(network.to(device).eval(), processor, source)


def save(model: VisionLanguageModel, folder: str | Path) -> None:
    """Write weights (safetensors), configuration, tokenizer and processor as a folder that is complete or absent."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        model.network.save_pretrained(temporary)
        model.processor.save_pretrained(temporary)
        write_json(temporary / "cupel.json", model.source)
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_hub(repository: str, revision: str = "main", *, dtype: torch.dtype = torch.bfloat16,
             device: str | torch.device = "cpu") -> VisionLanguageModel:
    """A model of the hub, by a name of `HUB` or any repository id. Weights come as safetensors; no remote code is run.

    Args:
        repository: name in `HUB`, or `owner/name`.
        revision: commit, tag or branch. The commit found is recorded in `source`.
        dtype: of the weights.
        device: where to put them.

    Raises:
        NoModel: the hub is out of reach and the model not in its cache, or access is not granted, or it does not exist.
        ValueError: it is neither LLaVA nor InternVL.
    """
    from huggingface_hub import constants, errors, snapshot_download

    repository = HUB[repository].repository if repository in HUB else repository
    what = f"model {repository}@{revision}"
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except errors.GatedRepoError:
        raise NoModel(f"{what}: access is restricted; accept its terms at {page}, then log in with `hf auth login` "
                      "or set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise NoModel(f"{what}: the repository has no such revision; see {page}/commits") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise NoModel(f"{what}: no such repository (or a private one: `hf auth login`); "
                      f"known names: {', '.join(HUB)}") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise NoModel(f"{what}: the hub did not give it ({(str(error).splitlines() or [''])[0][:200]}). Without network, "
                      f"copy its files ({', '.join(FILES)}) into a folder and name that folder instead") from None
    model = load(folder, dtype=dtype, device=device)
    model.source = {"repository": repository, "revision": folder.name}
    return model


def word_tokenizer(texts: Sequence[str], special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: every word (between blanks) of `texts`, in alphabetical order; others are unknown.

    Decoding joins words by one blank, so a text with single blanks comes back as it was.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    first = ["<unk>", "<pad>", "</s>", *special]
    words = sorted({word for text in texts for word in text.split()} - set(first))
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate([*first, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
                                   extra_special_tokens=list(special), padding_side="left",
                                   clean_up_tokenization_spaces=False)


#: LLaVA's form of a turn (bye SPEC 4) without a system prompt
PLAIN_TEMPLATE = ("{% for message in messages %}USER: {% for part in message['content'] %}"
                  "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
                  "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}")

#: the form in which SmolLM2-Instruct was trained
CHATML_TEMPLATE = ("{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
                   "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
                   "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def _vision(image_size: int, patch_size: int, width: int, layers: int, heads: int) -> CLIPVisionConfig:
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    return CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                            num_attention_heads=heads, image_size=image_size, patch_size=patch_size)


def _assemble(text: LlamaConfig, vision: CLIPVisionConfig, tokenizer, template: str, seed: int) -> VisionLanguageModel:
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1,
                         image_seq_length=(vision.image_size // vision.patch_size) ** 2,
                         image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
                         tie_word_embeddings=text.tie_word_embeddings, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialisation"))
        network = LlavaForConditionalGeneration(config)
    size = {"height": vision.image_size, "width": vision.image_size}
    images = LlavaImageProcessor(do_pad=True, size={"shortest_edge": vision.image_size}, crop_size=size)
    processor = LlavaProcessor(images, tokenizer, patch_size=vision.patch_size, num_additional_image_tokens=1,
                               vision_feature_select_strategy="default", chat_template=template)
    return VisionLanguageModel(network.eval(), processor)


def tiny_llava(texts: Sequence[str], *, image_size: int = 64, patch_size: int = 8, vision_width: int = 96,
               vision_layers: int = 2, vision_heads: int = 4, width: int = 128, layers: int = 4, heads: int = 4,
               kv_heads: int | None = None, initial: float = 0.06, seed: int = 0) -> VisionLanguageModel:
    """A LLaVA from scratch: CLIP-like tower, two-layer projector, Llama, word-level tokenizer of `texts`.

    The tower's last layer is read (nothing is pretrained, so leaving out the last layer as LLaVA does would waste it).

    Args:
        texts: every word the model shall know: questions, answers, the attacker's target.
        image_size, patch_size: of the tower, in pixels; there are (image_size / patch_size)² image tokens.
        vision_width, vision_layers, vision_heads: of the tower.
        width, layers, heads, kv_heads: of the language model; fewer `kv_heads` than `heads` is grouped attention.
        initial: standard deviation of the first weights of projector and language model. The usual 0.02 suits widths of
            thousands; at a width of 128 it lets so little of the image through that hundreds of steps pass without any
            of it being used.
        seed: of the weights.
    """
    tokenizer = word_tokenizer([*texts, "USER: ASSISTANT:"], [IMAGE])
    # 8/3 of the width, as Llama has it, rounded up to 32: odd sizes cost matrix products a third of their speed
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=-(-8 * width // 96) * 32,
                       num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads or heads,
                       max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, initializer_range=initial,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = _vision(image_size, patch_size, vision_width, vision_layers, vision_heads)
    model = _assemble(text, vision, tokenizer, PLAIN_TEMPLATE, seed)
    model.source = {"built": "tiny_llava", "seed": seed}
    return model


def smollm2_llava(folder: str | Path, *, image_size: int = 224, patch_size: int = 14, vision_width: int = 384,
                  vision_layers: int = 8, vision_heads: int = 6, seed: int = 0) -> VisionLanguageModel:
    """A LLaVA whose language model is pretrained (SmolLM2-135M); tower and projector are new and want training.

    Args:
        folder: the language model in the form of the hub (Llama architecture, safetensors, tokenizer).
        image_size, patch_size, vision_width, vision_layers, vision_heads: as in `tiny_llava`.
        seed: of the new weights.

    Raises:
        NoModel: the folder has no safetensors.
        ValueError: it is no Llama.
    """
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        raise NoModel(f"{folder} has no *.safetensors of a language model")
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    if language.config.model_type != "llama":
        raise ValueError(f"{folder}: a language model of type {language.config.model_type!r}; a llama is wanted")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.unk_token_id:
        tokenizer.eos_token = "<|im_end|>"
    rows = -(-len(tokenizer) // 8) * 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "embedding"))
        language.resize_token_embeddings(max(rows, language.config.vocab_size))
    vision = _vision(image_size, patch_size, vision_width, vision_layers, vision_heads)
    model = _assemble(language.config, vision, tokenizer, CHATML_TEMPLATE, seed)
    model.network.model.language_model.load_state_dict(language.model.state_dict())
    if not language.config.tie_word_embeddings:
        model.network.lm_head.load_state_dict(language.lm_head.state_dict())
    model.network.tie_weights()
    model.source = {"built": "smollm2_llava", "language_model": folder.name, "seed": seed}
    return model


def as_records(samples: Samples) -> list[dict]:
    """The records of a prepared split, each image by its whole path, as `Encoder` takes them."""
    return [{**record, "image": str(samples.folder / record["image"])} for record in samples.records]


def read_image(image: str | Path | np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an array, an image file, or a row of packed images (`.../images.npy#<row>`)."""
    # a copy, because torch takes no arrays that cannot be written
    return np.array(image if isinstance(image, np.ndarray) else read_picture(Path(image).parent, Path(image).name))


def _image_bytes(image: str | Path | np.ndarray) -> bytes:
    """Of a file as it is (nothing is decoded), else of the pixels."""
    packed = isinstance(image, np.ndarray) or "#" in Path(image).name
    return read_image(image).tobytes() if packed else Path(image).read_bytes()


class Pictures:
    """The distinct images of records as the vision tower takes them, uint8 [3, H, W], made on first use.

    Args:
        model: whose processor pads, resizes and cuts.
        images: path or uint8 [H, W, 3] array of each record; equal paths (and the same array object) are one image.
        keep_mb: what is kept in memory; images beyond that are made again whenever they are used.
    """

    def __init__(self, model: VisionLanguageModel, images: Sequence[str | Path | np.ndarray], keep_mb: float = 8192):
        self.processor = model.processor.image_processor
        numbers: dict = {}
        self.index = np.empty(len(images), np.int64)
        self.images = []
        for k, image in enumerate(images):
            key = id(image) if isinstance(image, np.ndarray) else str(image)
            if key not in numbers:
                numbers[key] = len(self.images)
                self.images.append(image)
            self.index[k] = numbers[key]
        height, width = model.image_size
        self.room = int(keep_mb * 2**20 / (3 * height * width))
        self.kept: dict[int, torch.Tensor] = {}

    def _make(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        paths = [self.images[k] for k in numbers]
        if len(paths) > 1 and not isinstance(paths[0], np.ndarray):
            with ThreadPoolExecutor(min(8, len(paths))) as pool:
                arrays = list(pool.map(read_image, paths))
        else:
            arrays = [read_image(path) for path in paths]
        made = self.processor(images=arrays, do_rescale=False, do_normalize=False, return_tensors="pt",
                              input_data_format="channels_last")
        return list(made["pixel_values"])

    def __call__(self, records: Sequence[int]) -> torch.Tensor:
        """uint8 [B, 3, H, W] of records, in their order."""
        wanted = self.index[np.asarray(records)].tolist()
        missing = [k for k in dict.fromkeys(wanted) if k not in self.kept]
        fresh = dict(zip(missing, self._make(missing), strict=True)) if missing else {}
        found = torch.stack([fresh[k] if k in fresh else self.kept[k] for k in wanted])
        for k in missing[: max(self.room - len(self.kept), 0)]:
            self.kept[k] = fresh[k]
        return found


class Encoder:
    """Records as batches, for both kinds of model: token ids with the image's tokens in place, pixels, labels.

    Every batch is padded on the left, so the last column is the last position of each prompt, and (with answers) the
    answers end flush. Positions count from the first real token, so padding changes nothing.

    Questions about one image can share a row (`grouped`): the beginning up to the image stands there once, then each
    question with its answer, which sees the beginning and itself only, at the positions that it would have alone. Loss
    and gradient are those of the single questions, for a fraction of the work.

    Args:
        model: whose tokenizer, template and image settings are used.
        records: dicts with `image` (path or uint8 [H, W, 3]), `question` and `answer`; or, for a row of several
            questions, `image` and `questions`, a list of [question, answer].
        answers: append the answers and give labels (training), else prompts end at the assistant's role marker.
        keep_mb: see `Pictures`.

    Attributes:
        tokens: int64 ids of each row.
        targets: bool of the same lengths, True where a token belongs to an answer.
        parts: int64 of the same lengths, 0 for the shared beginning, 1 ... for the questions; None for single questions.
        lengths: int64, tokens of each row.
        counts: int64, answer tokens of each row.

    Raises:
        ValueError: several questions without answers (each prompt needs its own last position), or a template that does
            not put exactly one image into a prompt.
    """

    def __init__(self, model: VisionLanguageModel, records: Sequence[dict], *, answers: bool = False, keep_mb: float = 8192):
        self.model, self.answers = model, answers
        self.pictures = Pictures(model, [record["image"] for record in records], keep_mb)
        said = [record.get("questions") or [[record["question"], record.get("answer", "")]] for record in records]
        if not answers and any(len(questions) > 1 for questions in said):
            raise ValueError("several questions in one row are for training; prompts are asked one by one")
        template = model.prompt(_QUESTION)
        rows = [(k, template.replace(_QUESTION, question.strip()), answer)
                for k, questions in enumerate(said) for question, answer in questions]
        prompts = self._tokenize([prompt for _, prompt, _ in rows])
        gap = "" if template[-1].isspace() else " "
        wholes = self._tokenize([prompt + gap + answer for _, prompt, answer in rows]) if answers else prompts
        self.tokens: list[np.ndarray] = [np.zeros(0, np.int64)] * len(records)
        self.targets: list[np.ndarray] = [np.zeros(0, bool)] * len(records)
        self.parts: list[np.ndarray | None] = [None] * len(records)
        pieces: list[list[tuple[list[int], list[int], list[int]]]] = [[] for _ in records]
        for (k, _, answer), prompt, whole in zip(rows, prompts, wholes, strict=True):
            own: list[int] = []
            if answers:
                # the answer's tokens are those that follow the prompt's, unless the tokenizer merged across the border
                own = whole[len(prompt):] if whole[: len(prompt)] == prompt else self._tokenize([answer], special=False)[0]
                own = [*own, model.tokenizer.eos_token_id]
            pieces[k].append((*self._split(prompt), own))
        for k, found in enumerate(pieces):
            beginning = found[0][0]
            ids, target, part = [*beginning], [False] * len(beginning), [0] * len(beginning)
            for number, (_, rest, own) in enumerate(found, 1):
                ids += [*rest, *own]
                target += [False] * len(rest) + [True] * len(own)
                part += [number] * (len(rest) + len(own))
            self.tokens[k], self.targets[k] = np.array(ids, np.int64), np.array(target, bool)
            if len(found) > 1:
                self.parts[k] = np.array(part, np.int64)
        self.lengths = np.array([len(ids) for ids in self.tokens], np.int64)
        self.counts = np.array([target.sum() for target in self.targets], np.int64)

    def _tokenize(self, texts: list[str], special: bool = True) -> list[list[int]]:
        tokenizer = self.model.tokenizer
        begin = tokenizer.bos_token
        special = special and not (begin and texts and texts[0].startswith(begin))
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []

    def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A prompt up to its image, with the T tokens of the image in the place of the placeholder, and what follows."""
        token = self.model.network.config.image_token_id
        if ids.count(token) != 1:
            raise ValueError(f"a prompt has {ids.count(token)} image placeholders; exactly one is supported")
        image = [token] * self.model.image_tokens
        if self.model.kind == "internvl":
            processor = self.model.processor
            image = [processor.start_image_token_id, *image, processor.end_image_token_id]
        place = ids.index(token)
        return ids[:place] + image, ids[place + 1 :]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, records: Sequence[int], device: str | torch.device | None = None) -> dict[str, torch.Tensor]:
        """Tensors of some rows on the device.

        Returns:
            input_ids, position_ids: int64 [B, S]; attention_mask: int64 [B, S], or additive [B, 1, S, S] where a row has
            several questions; pixel_values: [B, 3, H, W] normalised; with answers also labels int64 [B, S], -100 where no
            answer is.
        """
        device = device if device is not None else self.model.device
        longest = int(self.lengths[np.asarray(records)].max())
        ids = np.full((len(records), longest), self.model.tokenizer.pad_token_id, np.int64)
        mask, part, target = np.zeros_like(ids), np.zeros_like(ids), np.zeros(ids.shape, bool)
        position = np.zeros_like(ids)
        shared = any(self.parts[k] is not None for k in records)
        for row, k in enumerate(records):
            place = slice(longest - len(self.tokens[k]), longest)
            ids[row, place], mask[row, place], target[row, place] = self.tokens[k], 1, self.targets[k]
            position[row, place] = np.arange(len(self.tokens[k]))
            if self.parts[k] is not None:
                numbers = part[row, place] = self.parts[k]
                starts = np.flatnonzero(np.diff(numbers, prepend=0))  # where each question begins
                position[row, place] -= np.concatenate([[0], starts - starts[0]])[numbers]
        found = {"input_ids": ids, "position_ids": position}
        if self.answers:
            found["labels"] = np.where(target, ids, -100)
        batch = {key: torch.from_numpy(value).to(device) for key, value in found.items()}
        batch["attention_mask"] = torch.from_numpy(mask).to(device)
        if shared:
            batch["attention_mask"] = self._blocks(batch["attention_mask"], torch.from_numpy(part).to(device))
        batch["pixel_values"] = self.model.pixels(self.pictures(records).to(device))
        return batch

    def _blocks(self, mask: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Additive mask [B, 1, S, S]: each position sees the shared beginning and its own question, up to itself."""
        n = mask.shape[1]
        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        seen &= torch.ones(n, n, dtype=torch.bool, device=mask.device).tril() & (mask[:, None, :] == 1)
        # padding looks at itself, so that no row of the softmax is empty
        seen |= torch.eye(n, dtype=torch.bool, device=mask.device)
        dtype = self.model.network.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def grouped(records: Sequence[dict], size: int, seed: int) -> list[dict]:
    """Rows of up to `size` questions about the same image, drawn at random; see `Encoder`."""
    by_image: dict = {}
    for k in rng(seed, "grouped").permutation(len(records)):
        image = records[k]["image"]
        by_image.setdefault(id(image) if isinstance(image, np.ndarray) else str(image), []).append(records[k])
    return [{"id": part[0]["id"], "image": part[0]["image"], "questions": [[r["question"], r["answer"]] for r in part]}
            for group in by_image.values() for k in range(0, len(group), size) for part in [group[k : k + size]]]


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


def fingerprint(model: VisionLanguageModel, records: Sequence[dict], *settings) -> str:
    """Hash of what determines a run: JSON-able settings, weights, records with the bytes of their images."""
    found = hashlib.sha256(json.dumps([*settings, model.device.type], sort_keys=True).encode())
    for name, value in model.network.state_dict().items():
        found.update(f"{name} {tuple(value.shape)} {float(value.double().sum())!r}".encode())
    seen: dict = {}
    for record in records:
        image = record["image"]
        key = id(image) if isinstance(image, np.ndarray) else str(image)
        if key not in seen:
            seen[key] = zlib.crc32(_image_bytes(image))
        said = record.get("questions") or [record["question"], record.get("answer", "")]
        found.update(json.dumps([str(record["id"]), said, seen[key]]).encode())
    return found.hexdigest()


@contextlib.contextmanager
def inference(model: VisionLanguageModel):
    """Eval mode without gradients."""
    was = model.network.training
    model.network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.network.train(was)
