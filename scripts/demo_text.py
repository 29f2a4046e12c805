"""The path from text to a quantized model, with a text-to-image pipeline that knows nothing.

Builds a Stable Diffusion pipeline of random weights, so that nothing has to be downloaded, and runs the
recipe `mixup_class` with it on the bundled digits network. The pictures are noise: what is shown is that the
path works, not how good it is.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import zsq

sys.path.insert(0, str(Path(__file__).parent))
from tiny_pipeline import build  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-text"), help="where the folders go")
    arguments = parser.parse_args()
    console = Console()
    pipeline = arguments.out / "random-pipeline"
    build().save_pretrained(pipeline)
    settings = {
        "synthesis.pipeline": str(pipeline),
        "synthesis.steps": 3,
        "synthesis.num_images": 64,
        "synthesis.batch_size": 16,
    }
    with console.status("prompts, pictures, quantization"):
        run = zsq.quantize(
            "digits", recipe="mixup_class", bits="W4A4", budget="quick", overrides=settings, force=True,
            out=arguments.out / "run",
        )  # fmt: skip
    for record in run.prompts[:4]:
        console.print(f"  {record['texts'][0]}")
    agreement = run.record["results"]["estimated_without_data"]["calibration_images"]["top1_agreement"]
    console.print(
        f"[bold]{len(run.images)} pictures[/bold] from prompts such as these: "
        f"{arguments.out / 'run/images.png'}. They are noise, because the pipeline's weights are random; on "
        "them, the 4-bit network names the same class "
        f"as the original for {agreement:.0f} %. With a real pipeline, of some gigabytes:\n"
        "  zsq quantize resnet18.a1_in1k --recipe mixup_class --bits W4A4 --device cuda \\\n"
        "    --set synthesis.pipeline=stable-diffusion-v1-5/stable-diffusion-v1-5",
        highlight=False,
    )


if __name__ == "__main__":
    main()
