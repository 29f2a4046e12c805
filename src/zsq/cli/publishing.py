"""The command that makes a run ready for others."""

from pathlib import Path
from typing import Annotated

import typer

from zsq.cli.arguments import DebugOption, JsonOption
from zsq.cli.terminal import only_result_on_stdout, print_json, print_parts


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="USER/NAME", help="Hugging Face repository; by default only the folder is written"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder to write; by default RUN-published")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="of the teacher, such as apache-2.0; by default unknown"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="of the model on its card; by default the teacher's")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    with_images: Annotated[
        bool, typer.Option("--with-images", help="publish images that were given to the run, too")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace the folder of an earlier call")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a run with its exports and a model card for others, and upload it where asked."""
    with only_result_on_stdout():
        from zsq import publish

        if to is not None:
            publish.checked_repository(to)
        target = out or run.with_name(f"{run.name}-published")
        folder = publish.save_pretrained(
            run, target, licence=licence, name=name, with_images=with_images, force=force
        )
        address = publish.push(folder, to, private=private) if to is not None else None
    if as_json:
        print_json({"folder": str(folder), "address": address})
        return
    lines = [f"{folder} holds the model, its card ({publish.CARD}) and its account."]
    lines += [f"Uploaded: {address}"] if address else [f"To upload it: zsq push {run} --to USER/NAME --force"]
    print_parts("", *lines, f"To load it: zsq.load_pretrained({str(to or folder)!r})")
