"""Stand-in for the DiT: one attention whose inputs are the latents and the prompt; checks the sizes it was given."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from wan.modules.attention import attention


class CausalWanModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self, model_type, patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads,
        num_layers, local_attn_size, sink_size, eps,
    ):  # fmt: skip
        super().__init__()
        self.sizes = {"heads": num_heads, "width": dim // num_heads, "layers": num_layers, "text": text_len}
        self.patch_embedding = torch.nn.Conv3d(in_dim, dim, patch_size, stride=patch_size)

    def load_state_dict(self, state):
        names = ("patch_embedding.weight", "patch_embedding.bias")
        return super().load_state_dict({name: state[name] for name in names})

    def forward(self, x, prompt, timestep, kv_cache, crossattn_cache, current_start):
        sizes, (batch, _, _, rows, columns) = self.sizes, x.shape
        heads = [sizes["heads"], sizes["width"]]
        assert len(kv_cache) == len(crossattn_cache) == sizes["layers"]
        assert list(kv_cache[0]["k"].shape[2:]) == heads and kv_cache[0]["k"].shape[1] % (rows * columns // 4) == 0
        assert list(crossattn_cache[0]["v"].shape) == [batch, sizes["text"], *heads]
        assert current_start % (rows * columns // 4) == 0 and prompt.shape[:2] == (batch, sizes["text"])
        tokens = self.patch_embedding(x.swapaxes(1, 2)).flatten(2).swapaxes(1, 2)[:, :, None]
        seen = attention(tokens, tokens, tokens).mean((1, 2, 3)) + prompt.mean((1, 2)) + float(timestep) / 1000
        return 0.5 * x + seen.to(x.dtype).reshape(batch, 1, 1, 1, 1)
