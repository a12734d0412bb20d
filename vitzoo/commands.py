"""What each command of `vitzoo` takes and prints; the work is the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitzoo import __version__, commands_bench
from vitzoo.commands_weights import cli as weights
from vitzoo.errors import InputError

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

cli.add_typer(commands_bench.cli, name="bench")
cli.add_typer(weights, name="weights")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values, such as optim.lr=1e-3."),
]


def app(arguments: list[str]) -> int:
    """Run the command line; usage errors become `InputError`."""
    try:
        result = typer.main.get_command(cli).main(
            args=arguments, prog_name="vitzoo", standalone_mode=False
        )
    except Exception as error:
        # typer's usage errors share no public base over its versions; all of them format.
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message().rstrip(".")
        if not text:  # No command given: typer has shown the help.
            return 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "vitzoo"
        raise InputError(f"{text}; see `{command} --help`") from None
    return result if isinstance(result, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitzoo {__version__}")
        raise typer.Exit


@cli.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Vision transformers with efficient attention: train, evaluate, predict."""


@cli.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name or path; `vitzoo list --recipes`.")
    ],
    values: Overrides = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from published weights.")
    ] = False,
) -> None:
    """Train a recipe; the same command again goes on where a killed run stopped."""
    from vitzoo.engine.recipe import load_recipe
    from vitzoo.engine.train import train as run

    extra = ["model.pretrained=true"] if pretrained else []
    run(load_recipe(recipe, [*(values or []), *extra]))


@cli.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a weights file, or a model's NAME.TAG.")],
    values: Overrides = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Evaluate a run or published weights, beside what their origin states."""
    from vitzoo.engine.evaluate import evaluate as run
    from vitzoo.engine.machine import keep_freed_memory

    keep_freed_memory()
    run(model, values or [], json_path=json_path)


@cli.command()
def predict(
    model: Annotated[str, typer.Argument(help="A run, a weights file, or a model's NAME.TAG.")],
    images: Annotated[
        list[str], typer.Argument(help="Image files or folders, and KEY=VALUE recipe values.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each image.")] = 5,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Where the results go; default predictions.json in the run."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Also draw the results into this PNG file.")
    ] = None,
) -> None:
    """Predict on image files or folders: a table, and JSON."""
    from vitzoo.engine.machine import keep_freed_memory
    from vitzoo.engine.predict import predict_files

    keep_freed_memory()
    given = [value for value in images if "=" in value and not Path(value).exists()]
    files = [value for value in images if value not in given]
    predict_files(model, files, given, top=top, json_path=json_path, draw=draw)


@cli.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, a weights file, or a model's name.")],
    values: Overrides = None,
    to: Annotated[str, typer.Option(help="onnx, torch-export or openvino.")] = "onnx",
    dynamic: Annotated[
        str, typer.Option(help="What stays open: batch, size (height and width), or batch,size.")
    ] = "",
    features: Annotated[
        bool, typer.Option("--features", help="Export the feature maps instead.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="float16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="int8 weights and activations.")] = False,
    output: Annotated[Path | None, typer.Option(help="The graph's file.")] = None,
) -> int:
    """Export a graph, run it again and compare; exit 1 when it is off."""
    from vitzoo.engine.export import export as run
    from vitzoo.engine.report import console

    words = [word for word in dynamic.split(",") if word]
    made = run(
        model,
        to,  # type: ignore[arg-type]
        values or [],
        dynamic=words,
        features=features,
        half=half,
        int8=int8,
        output=output,
    )
    console().print(made.report(), markup=False)
    return 0 if made.agrees else 1


@cli.command()
def look(
    image: Annotated[str, typer.Argument(help="An image file.")],
    values: Overrides = None,
    model: Annotated[str, typer.Option(help="A run, a weights file, or a model's name.")] = "",
    query: Annotated[
        str | None, typer.Option(help="y,x in pixels of the model's input; its middle if absent.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Number, or a part of the name.")] = None,
    head: Annotated[int | None, typer.Option(help="One head; else the mean of all.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Figures of all layers instead: JSON and a plot.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Default look.png, or profile.json; a JSON or a plot goes beside it."),
    ] = None,
) -> None:
    """Draw which keys a query attends to, or profile all heads."""
    from vitzoo.engine.report import console

    if not model:
        raise InputError("look needs --model NAME")
    if profile:
        from vitzoo.engine.profiling import profile as run

        target = output or Path("profile.json")
        lines = run(image, model, values or [], output=target)
        files = f"{target.with_suffix('.json')}, {target.with_suffix('.png')}"
        console().print(f"{len(lines)} layers -> {files}", markup=False)
        return
    from vitzoo.engine.look import look as draw

    at = None
    if query is not None:
        parts = query.split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
            raise InputError(f"--query takes y,x in pixels, not {query!r}")
        at = (int(parts[0]), int(parts[1]))
    target = output or Path("look.png")
    found = draw(image, model, values or [], query=at, layer=layer, head=head, output=target)
    console().print(found.report(), markup=False)


@cli.command()
def demo(
    model: Annotated[str, typer.Argument(help="A run, a weights file, or a model's NAME.TAG.")],
    values: Overrides = None,
    port: Annotated[int, typer.Option(help="Where the page is served on this machine.")] = 7860,
) -> None:
    """Serve a page to try a model on: upload a photo, click on a query."""
    from vitzoo.engine.demo import Demo, build_page

    build_page(Demo(model, values or []), f"vitzoo: {model}").launch(server_port=port)


@cli.command(name="list")
def list_command(
    family: Annotated[str | None, typer.Argument(help="Only this family.")] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="List recipes instead.")] = False,
) -> None:
    """List the models, or the recipes."""
    from rich.table import Table

    from vitzoo.engine.report import console

    out = console()
    if recipes:
        from vitzoo.engine.recipe import recipe_names

        for name in recipe_names():
            out.print(name)
        return
    import vitzoo
    from vitzoo.zoo.published import all_entries

    names = vitzoo.list_models(family)
    if not names:
        known = sorted({vitzoo.info(name).family for name in vitzoo.list_models()})
        raise InputError(f"no family {family!r}; families: {', '.join(known)}")
    table = Table(box=None, header_style="bold")
    table.add_column("model", no_wrap=True)
    for column in ("params M", "GMACs", "input"):
        table.add_column(column, justify="right")
    table.add_column("weights")
    weights: dict[str, list[str]] = {}
    for entry in all_entries():
        weights.setdefault(entry.model, []).append(entry.tag)
    for name in names:
        record = vitzoo.info(name)
        params = "" if record.params is None else f"{record.params / 1e6:.1f}"
        gmacs = "" if record.gmacs is None else f"{record.gmacs:.1f}"
        size = "points" if record.modality == "points" else str(record.input_size[-1])
        table.add_row(name, params, gmacs, size, ", ".join(weights.get(name, [])))
    out.print(table)


@cli.command()
def info(
    name: Annotated[str, typer.Argument(help="A model's name, with or without a weight tag.")],
) -> None:
    """Show what the zoo knows of a model and its weights."""
    import vitzoo
    from vitzoo.engine.report import console
    from vitzoo.zoo.published import all_entries

    try:
        record = vitzoo.info(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    tags = [entry.tag for entry in all_entries() if entry.model == record.name]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        known = f"known: {', '.join(tags)}" if tags else "it has none"
        raise InputError(f"{record.name} has no weights {tag!r}; {known}")
    out = console()
    for key, value in vars(record).items():
        if value not in (None, False, {}, ()) and key != "limits":
            out.print(f"{key:>17}  {_shown(value)}", markup=False)
    for key, reason in record.limits.items():
        out.print(f"{'limit':>17}  {key}: {reason}", markup=False)
    for entry in all_entries():
        if entry.model == record.name:
            figures = ", ".join(f"{key} {value}" for key, value in entry.published)
            text = f"{entry.name} ({entry.dataset}; {figures or 'no figures'}; {entry.state})"
            out.print(f"{'weights':>17}  {text}", markup=False)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
