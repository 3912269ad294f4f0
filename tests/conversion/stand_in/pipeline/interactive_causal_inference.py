"""Stand-in: the same with prompt switches; a recache is one more pass of the generator."""

from pipeline.causal_inference import CausalInferencePipeline


class InteractiveCausalInferencePipeline(CausalInferencePipeline):
    def _recache_after_switch(self, output, current_start_frame, new_conditional_dict):
        self.generator(
            output[:, :current_start_frame],
            new_conditional_dict,
            self.args.context_noise,
            kv_cache=self.kv_cache1,
            crossattn_cache=self.crossattn_cache,
            current_start=0,
        )

    def inference(self, noise, *, text_prompts_list, switch_frame_indices, return_latents=False):
        conditions = [self.text_encoder(text_prompts=prompts) for prompts in text_prompts_list]
        output, segment = self.start(noise), 0
        for start in range(0, noise.shape[1], self.args.num_frame_per_block):
            if segment < len(switch_frame_indices) and start >= switch_frame_indices[segment]:
                segment += 1
                self._recache_after_switch(output, start, conditions[segment])
            self.block(noise, output, start, conditions[segment])
        return self.finish(output, return_latents)
