"""How many bits weights and activations get: the scheme that a user names."""

import re
from dataclasses import dataclass, field

from zsq.errors import UsageError

ENDS = ("8bit", "same")
PLACEMENTS = ("research", "engine")
SOFTMAX_CODES = ("uniform", "log2")
RESIDUAL_STREAMS = ("float", "quantized")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits of weights and activations.

    Attributes:
        weight_bits: 2..8.
        activation_bits: 2..8, or None to leave activations in float.
        ends: "8bit" (protocol P-B: first and last layer's weights, the second layer's and the last layer's
            input have 8 bits) or "same" (protocol P-A: every quantizer has the scheme's bits). The images
            themselves are not quantized in either: they come as 8-bit pixels.
        placement: which activations are quantized: "research" (inputs of layers and identity shortcuts) or
            "engine" (the images too, and what layers and additions return, so that engines compute all of it
            in integers), see `place_for_engine`.
        softmax: codes of what a softmax gives to a product: "uniform", or "log2", whose codes are exponents
            of 2 (at 4 bits; multiples of 2^(4 - bits) at others), fine near 0 and coarse near 1.
        residual_stream: "float" leaves alone what blocks of transformers add to, as every layer reads it
            through a normalisation (LayerNorm, GroupNorm, RMSNorm) and quantized would add an error in each
            block that stays in it to the end; "quantized" takes it as any other shortcut. Placement "engine"
            quantizes it.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    ends: str = "8bit"
    placement: str = field(default="research", metadata={"described": "unless default"})
    softmax: str = field(default="uniform", metadata={"described": "unless default"})
    residual_stream: str = field(default="float", metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        for bits in (self.weight_bits, self.activation_bits):
            if bits is not None and not 2 <= bits <= 8:
                raise UsageError(
                    f"Bits must be between 2 and 8, got {bits}. Examples: W4A4, W4A8, W8A8, W2A4, W4."
                )
        if self.ends not in ENDS:
            raise UsageError(f"ends must be one of {', '.join(ENDS)}, got {self.ends!r}.")
        if self.placement not in PLACEMENTS:
            raise UsageError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}.")
        if self.softmax not in SOFTMAX_CODES:
            raise UsageError(f"softmax must be one of {', '.join(SOFTMAX_CODES)}, got {self.softmax!r}.")
        if self.residual_stream not in RESIDUAL_STREAMS:
            raise UsageError(
                f"residual_stream must be one of {', '.join(RESIDUAL_STREAMS)}, got {self.residual_stream!r}."
            )
        if self.placement == "engine" and self.softmax != "uniform":
            raise UsageError(
                "Engines multiply uniform codes only: placement 'engine' needs softmax 'uniform', got "
                f"{self.softmax!r}."
            )
        if self.placement == "engine" and self.activation_bits is None:
            raise UsageError(
                f"placement 'engine' says which activations are quantized, and {self.bits} leaves them in "
                f"float. Take W{self.weight_bits}A8, or leave the placement out."
            )

    @property
    def is_eight_bit(self) -> bool:
        """Whether nothing has fewer than 8 bits; rounding to nearest is then as good as learned rounding."""
        return self.weight_bits == 8 and self.activation_bits in (8, None)

    @property
    def bits(self) -> str:
        """The scheme as users write it: W4A4, or W4 when activations stay in float."""
        return f"W{self.weight_bits}" + ("" if self.activation_bits is None else f"A{self.activation_bits}")


def parse_bits(text: str, *, ends: str = "8bit", placement: str = "research") -> Scheme:
    """Read W4A4, W4A8, W8A8, W2A4, W4 (weights only) ...; case does not matter.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"W([0-9]{1,3})(?:A([0-9]{1,3}))?", text.strip().upper())
    if match is None:
        raise UsageError(
            f"Bits must look like W4A4 (weights 4, activations 4) or W4 (weights only), got {text!r}. "
            "Both numbers go from 2 to 8."
        )
    weight_bits, activation_bits = match.groups()
    return Scheme(
        weight_bits=int(weight_bits),
        activation_bits=int(activation_bits) if activation_bits else None,
        ends=ends,
        placement=placement,
    )
