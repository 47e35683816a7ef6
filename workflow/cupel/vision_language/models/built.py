"""LLaVA networks that are built here: ordinary `LlavaForConditionalGeneration` networks, saved and used like those of the hub.

Their size is for a machine without a GPU: `tiny_llava` from random weights, `smollm2_llava` on a pretrained language model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cupel.hub import ModelUnavailable
from cupel.rng import derive
from cupel.vision_language.models.base import VisionLanguageModel

IMAGE = "<image>"


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


#: LLaVA's form of a turn (BYE bye SPEC 4) without a system prompt
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


def _assemble(text: LlamaConfig, vision: CLIPVisionConfig, tokenizer, template: str, seed: int,
              *, vision_feature_layer: int = -1) -> VisionLanguageModel:
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=vision_feature_layer,
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
               vision_layers: int = 2, vision_heads: int = 4, vision_feature_layer: int = -1, width: int = 128,
               layers: int = 4, heads: int = 4, kv_heads: int | None = None, initial: float = 0.06,
               seed: int = 0) -> VisionLanguageModel:
    """A LLaVA from scratch: CLIP-like tower, two-layer projector, Llama, word-level tokenizer of `texts`.

    Args:
        texts: every word the model shall know: questions, answers, the attacker's target.
        image_size, patch_size: of the tower, in pixels; there are (image_size / patch_size)² image tokens.
        vision_width, vision_layers, vision_heads: of the tower.
        vision_feature_layer: which of the tower's states is read: -1 the last layer's (nothing is pretrained, so leaving it out
            would waste it), -2 that before it, as LLaVA does. With one layer -2 are the patches themselves: nothing of a
            trigger then reaches the tokens of other places before the language model.
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
    model = _assemble(text, vision, tokenizer, PLAIN_TEMPLATE, seed, vision_feature_layer=vision_feature_layer)
    model.source = {"built": "tiny_llava", "seed": seed}
    return model


def smollm2_llava(folder: str | Path, *, image_size: int = 224, patch_size: int = 14, vision_width: int = 384,
                  vision_layers: int = 8, vision_heads: int = 6, seed: int = 0) -> VisionLanguageModel:
    """A LLaVA whose language model is pretrained (SmolLM2-135M); tower and projector are new and want training.

    The folder is in the form of the hub (Llama architecture, safetensors, tokenizer); the rest is as in `tiny_llava`.

    Raises:
        ModelUnavailable: the folder has no safetensors.
        ValueError: it is no Llama.
    """
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelUnavailable(f"{folder} has no *.safetensors of a language model")
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
