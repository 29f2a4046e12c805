"""The headings of a report, in order, and how to read what is below them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A heading of the page, and how to read what is below it; the panels of runs are under its name."""

    name: str
    title: str
    reading: str


SECTIONS = (
    Section(
        "images",
        "Images",
        "What the network was calibrated on: made without data, or given. Above the line the teacher's class "
        "and its probability, below it the student's; framed where they differ.",
    ),
    Section(
        "batch_norm",
        "BatchNorm gap",
        "How far the images' statistics are from those that each BatchNorm layer stored in training, in "
        "units of its stored deviation: 0 is a perfect match. Layers that stay far were not met by "
        "the synthesis.",
    ),
    Section(
        "units",
        "Error per unit",
        "Signal-to-noise ratio of what each unit returns, student against teacher: 6 dB more is half the "
        "error. A bar shows what learning gained over rounding to nearest.",
    ),
    Section(
        "rounding",
        "Rounding flips",
        "Share of the weights whose stored code is not the one that rounding to nearest gave before "
        "learning; after fine-tuning with other ranges, codes may differ for their grid alone.",
    ),
    Section(
        "weights",
        "Weights on their grid",
        "Outlined in blue the float weights, in orange the codes that are stored for them; vertical lines "
        "are the levels, up to 16 of them.",
    ),
    Section(
        "activations",
        "Activations on their grid",
        "What arrives at each quantizer on the run's images; lines are its levels (the shade its range, at "
        "more than 16 of them). Heights are square roots, so that rare values show.",
    ),
    Section(
        "losses",
        "Loss curves",
        "As they were logged; dotted lines part one batch or unit from the next. In the reconstruction, loss "
        "is the distance to the teacher plus, after the warm-up, the penalty that makes roundings decide.",
    ),
    Section(
        "placement",
        "Bits over the network",
        "Layers in order of computation, joined as the tensors flow. W: bits of the weights, A: bits of what "
        "the step reads.",
    ),
    Section(
        "exports",
        "Exported files",
        "How far files for engines agree with the student, on the run's images, and how fast they were here.",
    ),
    Section("settings", "Settings", "What differs from the recipe's own settings, and why."),
)
