"""Stand-in: the networks."""

import torch
from wan.modules.causal_model import CausalWanModel
from wan.modules.causal_model import CausalWanModel as CausalWanModelInfinity  # noqa: F401
from wan.modules.tokenizers import HuggingfaceTokenizer


def umt5_xxl(encoder_only, return_tokenizer, dtype, device, dim=4096, **sizes):
    return torch.nn.Embedding(sizes.get("vocab_size", 256384), dim)


def _video_vae(pretrained_path, z_dim, dim=96):
    torch.load(pretrained_path, weights_only=True)
    model = torch.nn.Module()
    model.dim = dim
    return model


class WanTextEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.text_encoder = umt5_xxl(encoder_only=True, return_tokenizer=False, dtype=None, device=None)
        weights = torch.load("wan_models/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
        self.text_encoder.load_state_dict({"weight": weights["token_embedding.weight"]})
        self.tokenizer = HuggingfaceTokenizer(name="wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl/", seq_len=512)

    @property
    def device(self):
        return torch.cuda.current_device()

    def forward(self, text_prompts):
        return {"prompt_embeds": self.text_encoder(self.tokenizer(text_prompts).to(self.device))}


class WanVAEWrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = _video_vae(pretrained_path="wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", z_dim=16)

    def decode_to_pixel(self, latent, use_cache=False):
        """Four frames a latent (one of the first), 8 pixels a cell, in three of the channels."""
        frames = latent[:, :, :3].repeat_interleave(4, 1)[:, 3:]
        return frames.repeat_interleave(8, 3).repeat_interleave(8, 4).clamp(-1, 1)

    def decode_to_pixel_chunk(self, latent, use_cache=False):
        return self.decode_to_pixel(latent)


class WanDiffusionWrapper(torch.nn.Module):
    def __init__(
        self, timestep_shift=8.0, is_causal=False, local_attn_size=-1, sink_size=0, use_infinite_attention=False
    ):
        super().__init__()
        self.model = CausalWanModel.from_pretrained(
            "wan_models/Wan2.1-T2V-1.3B/", local_attn_size=local_attn_size, sink_size=sink_size
        )
        self.seq_len = 32760

    def forward(self, x, condition, timestep, kv_cache, crossattn_cache, current_start):
        return None, self.model(x, condition["prompt_embeds"], timestep, kv_cache, crossattn_cache, current_start)
