"""A tokenizer of a few words, as LLaMA's SentencePiece treats spaces."""

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Marks words' beginnings as LLaMA's SentencePiece does, and begins each text with <s>."""
    words = ["<s>", "</s>", "<unk>", "▁Human:", "▁Assistant:", "▁hi", "▁a", "▁b", "▁c", "\n\n"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
