"""The parts of `sticker-dit`: a small Flux transformer, its second text encoder and tokenizer, and the pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser
from diffusion_accel.training.sampling import scheduler_for

from .models import Shape

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

STATES_LENGTH = 32  # tokens of the second encoder's texts, padding included
HEAD = 32  # channels of an attention head
LONGER, SHARE = 512, 0.03  # tokens that training pads texts to in such a share of its steps: what Flux pads to


def train_states_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A unigram tokenizer as T5's: padding 0, end 1, unknown 2. A small corpus gives a smaller vocabulary.

    Unlike T5's it makes letters small, as CLIP's does; transformers' own T5Tokenizer cannot keep such a step.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    learner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(sorted(set(corpus)), trainer)
    end = ("</s>", learner.token_to_id("</s>"))
    learner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=learner, model_max_length=STATES_LENGTH, **special)


def build_states_encoder(shape: Shape, vocabulary: int) -> T5EncoderModel:
    """T5EncoderModel with heads of 32 channels, as wide as the first text encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=shape.text_width,
        d_kv=HEAD,
        num_heads=shape.text_width // HEAD,
        d_ff=2 * shape.text_width,
        num_layers=shape.states_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def build_transformer(shape: Shape) -> FluxTransformer2DModel:
    """FluxTransformer2DModel whose tokens are 2x2 latents, with the states of T5 and CLIP's pooled vector."""
    from diffusers import FluxTransformer2DModel

    double, single = shape.transformer_blocks
    return FluxTransformer2DModel(
        in_channels=4 * shape.latent_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=shape.transformer_heads,
        joint_attention_dim=shape.text_width,
        pooled_projection_dim=shape.text_width,
        axes_dims_rope=(8, 12, 12),
    )


def initialise(transformer: FluxTransformer2DModel) -> None:
    """What diffusers leaves to the checkpoint: modulations and the output begin at zero (adaLN-Zero).

    Source: Peebles and Xie 2023, "Scalable diffusion models with transformers", section 3.2.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    norms = [
        getattr(block, name) for block in blocks for name in ("norm", "norm1", "norm1_context") if hasattr(block, name)
    ]
    for layer in [*(norm.linear for norm in norms), transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class FluxDenoiser(Denoiser):
    """A Flux transformer with both of its text encoders, called as `FluxPipeline` does.

    A condition is the token ids of both texts side by side: CLIP's, then T5's, which has no attention mask. In training
    a share of the steps pads it further, so that a caller who leaves Flux's 512 tokens as they are is understood too.
    """

    def __init__(self, transformer: FluxTransformer2DModel, text: CLIPTextModel, states: T5EncoderModel) -> None:
        super().__init__(transformer, text)
        self.states = states

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Noisy latents (N, C, h, w), timesteps 1000 s (N,) and ids (N, tokens) -> velocity (N, C, h, w)."""
        assert condition is not None and self.text is not None
        pooled_ids, ids = condition[:, :-STATES_LENGTH], condition[:, -STATES_LENGTH:]
        if self.training and float(torch.rand(())) < SHARE:  # torch's generator, which every step of training seeds
            ids = nn.functional.pad(ids, (0, LONGER - STATES_LENGTH))
        states = self.states(input_ids=ids).last_hidden_state
        n, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.view(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(x.device, x.dtype)
        predicted = self.core(
            hidden_states=tokens,
            encoder_hidden_states=states,
            pooled_projections=self.text(input_ids=pooled_ids).pooler_output,
            timestep=timesteps / 1000,
            img_ids=grid,
            txt_ids=x.new_zeros(states.shape[1], 3),
            return_dict=False,
        )[0]
        blocks = predicted.view(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return blocks.reshape(n, channels, height, width)


def build_flux_pipeline(
    vae: AutoencoderKL, denoiser: FluxDenoiser, tokenizer: CLIPTokenizer, states_tokenizer: PreTrainedTokenizerFast
) -> FluxPipeline:
    """FluxPipeline of the parts, with flow-matching Euler without a shift of its timesteps."""
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=scheduler_for(Process("flow")),
        vae=vae,
        text_encoder=denoiser.text,
        tokenizer=tokenizer,
        text_encoder_2=denoiser.states,
        tokenizer_2=states_tokenizer,
        transformer=denoiser.core,
    )
