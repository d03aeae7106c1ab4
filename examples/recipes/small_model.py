"""A small LLaMA and a tokenizer, made on the spot and saved to disk in Hugging Face's format.

For trying the recipes where there is no download: they read this folder by `from_pretrained`, as
they read any other. The weights are random.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


def some_text() -> str:
    """The prose of Python's language reference, which comes with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def tokenizer(text: str, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text; like LLaMA's it has no token for padding."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def save(folder: Path, hidden: int = 64, layers: int = 2, vocab: int = 512) -> None:
    """Write the model to folder/model, in bfloat16, and the text to folder/text.txt."""
    text = some_text()[:60_000]
    words = tokenizer(text, vocab)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(text, encoding="utf-8")
