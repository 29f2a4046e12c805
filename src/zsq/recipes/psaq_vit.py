"""PSAQ-ViT."""

from zsq.images.look_settings import Cosine, PatchSimilarity, Smoothness, Views
from zsq.images.pixel_settings import ClassGuide, PixelSynthesis
from zsq.recipe import Recipe

PSAQ_IMAGES = PixelSynthesis(
    num_images=256,
    batch_size=32,
    steps=1000,
    lr=0.2,
    momentum=0.5,
    cosine=Cosine(),
    valid_pixels=True,
    bn=None,
    classes=ClassGuide(),
    patches=PatchSimilarity(),
    smoothness=Smoothness(),
    views=Views(agreement=0.0),
)

PSAQ_VIT = Recipe(
    name="psaq_vit",
    paper="PSAQ-ViT: Patch Similarity Aware Data-Free Quantization, ECCV 2022, arXiv:2203.02250",
    synthesis=PSAQ_IMAGES,
)
