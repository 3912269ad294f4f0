"""Stand-in: denoises block by block; a block's latents depend on all that the recorder hands over."""

import torch
from utils.memory import gpu  # noqa: F401  (made at import)
from utils.wan_wrapper import WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper


class CausalInferencePipeline(torch.nn.Module):
    def __init__(self, args, device, generator=None, text_encoder=None, vae=None):
        super().__init__()
        self.args = args
        self.generator = WanDiffusionWrapper(**args.model_kwargs, is_causal=True)
        self.text_encoder = text_encoder or WanTextEncoder()
        self.vae = vae or WanVAEWrapper()
        self.num_transformer_blocks = 30
        self.frame_seq_length = 1560

    def _initialize_kv_cache(self, batch_size, dtype, device, kv_cache_size_override=None):
        shape = (batch_size, kv_cache_size_override, 12, 128)
        self.kv_cache1 = [
            {n: torch.zeros(shape, dtype=dtype) for n in "kv"} for _ in range(self.num_transformer_blocks)
        ]

    def _initialize_crossattn_cache(self, batch_size, dtype, device):
        shape = (batch_size, 512, 12, 128)
        self.crossattn_cache = [
            {n: torch.zeros(shape, dtype=dtype) for n in "kv"} for _ in range(self.num_transformer_blocks)
        ]

    def start(self, noise):
        batch, frames = noise.shape[:2]
        window = self.args.model_kwargs.local_attn_size
        slots = (frames if window == -1 else window) * self.frame_seq_length
        self._initialize_kv_cache(batch, noise.dtype, noise.device, kv_cache_size_override=slots)
        self._initialize_crossattn_cache(batch_size=batch, dtype=noise.dtype, device=noise.device)
        return torch.zeros_like(noise)

    def block(self, noise, output, start, condition):
        call = {"kv_cache": self.kv_cache1, "crossattn_cache": self.crossattn_cache}
        call["current_start"] = start * self.frame_seq_length
        frames = slice(start, start + self.args.num_frame_per_block)
        x, steps = noise[:, frames], self.args.denoising_step_list
        for i, step in enumerate(steps):
            _, x0 = self.generator(x, condition, step, **call)
            if i < len(steps) - 1:
                x = (x0.flatten(0, 1) + torch.randn_like(x0.flatten(0, 1))).unflatten(0, x0.shape[:2])
        output[:, frames] = x0
        self.generator(x0, condition, self.args.context_noise, **call)

    def finish(self, output, return_latents):
        chunked = getattr(self.args.model_kwargs, "use_infinite_attention", False)
        decode = self.vae.decode_to_pixel_chunk if chunked else self.vae.decode_to_pixel
        video = decode(output, use_cache=False)
        return (video, output) if return_latents else video

    def inference(self, noise, text_prompts, return_latents=False):
        condition = self.text_encoder(text_prompts=text_prompts)
        output = self.start(noise)
        for start in range(0, noise.shape[1], self.args.num_frame_per_block):
            self.block(noise, output, start, condition)
        return self.finish(output, return_latents)
