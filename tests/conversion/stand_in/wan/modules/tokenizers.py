import ftfy
import regex
import torch
from transformers import AutoTokenizer  # noqa: F401


class HuggingfaceTokenizer:
    def __init__(self, name, seq_len):
        self.seq_len = seq_len

    def __call__(self, prompts):
        """A token a letter."""
        prompts = [regex.sub(r"\s+", " ", ftfy.fix_text(prompt)) for prompt in prompts]
        return torch.tensor([[ord(c) % 90 for c in prompt.ljust(self.seq_len)[: self.seq_len]] for prompt in prompts])
