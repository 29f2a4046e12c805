"""A real Stable Diffusion pipeline of 1.7 million random weights: what it paints is noise, all else is real.

    python scripts/tiny_pipeline.py FOLDER

For tests and `make demo-text`, which need a pipeline of diffusers without a network connection.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from zsq.images.text_to_image import without_broken_torchvision


def build(seed: int = 0) -> Any:
    """A StableDiffusionPipeline for pictures of 32 x 32 pixels, float32, on the CPU."""
    with without_broken_torchvision():
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        characters = _printable_bytes()
        words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        start, end = len(words) - 2, len(words) - 1
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=[32, 64, 64],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=4,
            norm_num_groups=8,
        )
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _printable_bytes() -> list[str]:
    """One printable character for each of the 256 bytes, as byte-level tokenizers name them."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in own] + [chr(256 + n) for n in range(256 - len(own))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build().save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
