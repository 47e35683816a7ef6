"""Vision-language models and the encoder that makes batches for them.

Whatever the size, a model here is a `VisionLanguageModel`: network, processor, and where it came from.
"""

from cupel.vision_language.models.base import VisionLanguageModel, fitting_batch, inference, load, load_hub, save
from cupel.vision_language.models.built import smollm2_llava, tiny_llava, word_tokenizer
from cupel.vision_language.models.encoder import Encoder, Pictures, as_records, fingerprint, grouped

__all__ = ["Encoder", "Pictures", "VisionLanguageModel", "as_records", "fingerprint", "fitting_batch", "grouped",
           "inference", "load", "load_hub", "save", "smollm2_llava", "tiny_llava", "word_tokenizer"]
