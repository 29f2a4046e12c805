"""PSAQ-ViT: images from a network without BatchNorm, by what its attention makes of their patches.

Paper: Li, Ma, Chen, Xiao, Gu, "Patch Similarity Aware Data-Free Quantization for Vision Transformers", ECCV
2022, arXiv:2203.02250. Pixels are optimised from noise so that in every attention the cosines between patches
have a high entropy, the teacher sees the class that the image is asked to be, and neighbouring pixels differ
as much as in photographs; each step shows the images moved around the edge and mirrored. A network without
attention (ConvNeXt, other networks with LayerNorm or with BatchNorm folded) has the other terms alone.

Where this differs from the paper and its code:

* The total variation is a root mean square, so that its target does not depend on the number and size of the
  images: 2500 to 3000 over 32 images of 224 pixels are 0.285 to 0.342, and the weight 0.05 is 438.
* Cosines are those of all patches: the class token is found by the number of tokens (one more than a square).
  The code leaves out the first token of Swin's windows too, which have none.
* The density is that of the paper's code: 10 points between the lowest and highest cosine.
* All networks have the learning rate of DeiT, 0.2; the code's is 0.25 for Swin.
* 256 images, in batches of 32; the paper calibrates on one such batch. Rounding is learned here,
  unit by unit as in Genie. `--set reconstruction=none` rounds to nearest, as the paper does.
* Quantized are what layers read, queries, keys, values and what the softmax gives; the code quantizes the
  scores before the softmax and the results of layers instead. Weights have a range a channel. What blocks add
  to stays in float, as in PTQ4ViT and RepQ-ViT (`--set scheme.residual_stream=quantized` quantizes it).
* Agreement of two views (`--set synthesis.views.agreement=1`, two passes a step) is not in the paper.

Top-1 on cifar10_tiniest (LayerNorm, no attention; 90.58 in float), 4905 test images, seed 0, `--budget quick
--set synthesis.num_images=64 --set synthesis.steps=100 --set reconstruction.steps=100 --set num_holdout=0`:

    bits   psaq_vit   real images   noise, to nearest
    W8A8   90.15      90.46         89.48
    W4A8   89.44      89.95         88.44

Real images: `given-nearest --budget quick` at W8A8, `given --budget standard` at W4A8 (256 images, 400 steps
a unit). Noise: `noise-nearest --budget quick`. Agreement of two views changed nothing that 1000 images would
show (32 images of 100 steps: 90.6 and 90.7 at W8A8, 90.2 and 90.1 at W4A8 to nearest, 91.1 in float).

W6A6 and W4A4 at the same counts, for real images too, all 4905 test images (`zsq bench
benchmarks/tiniest.toml`, benchmarks/results/tiniest.md), learned and rounded to nearest, seed 0:

    bits   psaq_vit   to nearest   64 real images   to nearest   noise, to nearest
    W6A6   89.81      89.81        90.13            90.05        88.81
    W4A4   84.32      83.20        87.22            84.87        78.57

With seed 1, W4A4: 86.01, to nearest 83.85 and with real images 86.01. Seeds differ by more than a point;
the gain by learning is 1.1 and 2.2 points, and two seeds do not prove it. Learning brings the logits of its
own images about 5 dB nearer to the teacher's at both; at W6A6 that wins nothing on test images.

To nearest, first 1000 test images (91.1 in float), W4A4: 82.5, with `norm_equalization=on` 82.1: this
network gains nothing by it. Nor by the L2 prior of pixels, seed 0, W4A4 to nearest, 4905 images: 83.20
without it, 83.61 with `synthesis.norm_weight=1`, 83.59 with 10, within what a seed may change.

No transformer with real weights was measured. timm networks with random weights, 1000 classes, 224 pixels, 32
images that 50 steps on vit_tiny made, these mirrored and these moved by 8 pixels: on how many of 96 the
student names the teacher's class at W8A8, and with the residual stream quantized too:

    vit_tiny, deit_tiny   94   84
    swin_tiny             93   91
    convnext_atto         96        (has no such stream)

The whole path, on images of their own: at the quick budget (32 of 100 steps, of 30 classes) vit_tiny and
deit_tiny, which with random weights are one network, agree on all 32, after 30 steps on 30; swin_tiny and
convnext_atto on all 16 of 20 steps. Those 84 have 21 dB of signal to noise in the logits, the 94 have 30:
quantized, the stream keeps an error of 41 dB from each of its 24 additions. What is left comes evenly from
weights (37 dB alone) and activations. ONNX files of all four at W8A8, and of deit_tiny and convnext_atto at
W4A8, agree with their students. At W4A8 to nearest vit_tiny names the same class on 58 of 96.

Besides, for any recipe: `--set scheme.softmax=log2` gives softmax weights logarithmic codes, and
`--set norm_equalization=on` gives the channels after a LayerNorm one range (RepQ-ViT, arXiv:2212.08254).
"""

from zsq.images.class_settings import ClassGuide
from zsq.images.look_settings import Cosine, PatchSimilarity, Smoothness, Views
from zsq.images.pixel_settings import PixelSynthesis
from zsq.recipe import Recipe, Reconstruction

PSAQ_VIT = Recipe(
    name="psaq_vit",
    paper="PSAQ-ViT: Patch Similarity Aware Data-Free Quantization, ECCV 2022, arXiv:2203.02250",
    synthesis=PixelSynthesis(
        num_images=256,
        batch_size=32,
        steps=1000,
        lr=0.2,
        momentum=0.5,
        cosine=Cosine(rounds=2, warmup=0.2),
        valid_pixels=True,
        bn=None,
        classes=ClassGuide(),
        patches=PatchSimilarity(points=10, bandwidth=0.01),
        smoothness=Smoothness(weight=438.0, lowest=0.285, highest=0.342),
        views=Views(jitter=0.134, mirror=0.5),
    ),
    reconstruction=Reconstruction(),
)
