"""`vitzoo weights`: what is published, having it, checking it, and passing it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from vitzoo.errors import InputError
from vitzoo.zoo.entries import State, WeightEntry

cli = typer.Typer(no_args_is_help=True, help="List, fetch, verify, convert and share weights.")

CacheDir = Annotated[
    Path | None, typer.Option("--cache-dir", help="Instead of the hub's and the user's caches.")
]


@cli.command(name="list")
def list_weights(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    licence: Annotated[str | None, typer.Option(help="Only this licence, such as mit.")] = None,
    state: Annotated[str | None, typer.Option(help="Only this state of the source.")] = None,
) -> None:
    """List the published weights."""
    from rich.table import Table

    from vitzoo.engine.report import console

    table = Table(box=None, header_style="bold")
    table.add_column("weights", no_wrap=True)
    for column in ("task", "data", "licence", "state", "published"):
        table.add_column(column)
    for entry in _chosen(family, licence, state):
        figures = ", ".join(f"{key} {value:g}" for key, value in entry.published)
        licence_text = entry.licence or "not stated"
        table.add_row(entry.name, entry.task, entry.dataset, licence_text, entry.state, figures)
    out = console()
    if not out.is_terminal:
        out.width = 240  # Through a pipe nothing is cut.
    out.print(table)


def _chosen(family: str | None, licence: str | None, state: str | None) -> list[WeightEntry]:
    import difflib

    import vitzoo
    from vitzoo.zoo.published import all_entries

    found = all_entries()
    families = {entry.name: vitzoo.info(entry.model).family for entry in found}
    chosen = found
    for what, wanted, value_of in (
        ("family", family, lambda entry: families[entry.name]),
        ("licence", licence, lambda entry: entry.licence or "not stated"),
        ("state", state, lambda entry: entry.state),
    ):
        if wanted is not None:
            # A state is legal also while no entry is in it.
            states = get_args(State) if what == "state" else ()
            known = sorted({*states, *map(value_of, found)})
            if wanted not in known:
                near = difflib.get_close_matches(wanted, known, n=1)
                hint = f"did you mean {near[0]}? There" if near else "there"
                text = f"no weights of {what} {wanted!r}; {hint} are {', '.join(known)}"
                raise InputError(text)
            chosen = [entry for entry in chosen if value_of(entry) == wanted]
    return chosen


@cli.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="NAME.TAG of the table, or hf-hub:ORG/NAME.")],
    cache_dir: CacheDir = None,
) -> None:
    """Download and verify weights; prints where they are."""
    from vitzoo.engine.report import console
    from vitzoo.zoo import download
    from vitzoo.zoo.files import sha256_of

    for name in names:
        if name.startswith(("hf-hub:", "http://", "https://")):
            try:
                path = download.fetch_source(name, cache_dir=cache_dir)
            except InputError as error:
                raise InputError(f"{name} could not be had: {error}") from error
        else:
            path = download.fetch(_entry(name), cache_dir=cache_dir)
        console().print(f"{path}\nsha256 {sha256_of(path)}", markup=False, soft_wrap=True)


def _entry(name: str) -> WeightEntry:
    import difflib

    from vitzoo.zoo.published import all_entries

    found = {entry.name: entry for entry in all_entries()}
    if name in found:
        return found[name]
    first = next((entry for entry in found.values() if entry.model == name), None)
    if first is not None:
        return first
    near = difflib.get_close_matches(name, found, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "; see `vitzoo weights list`"
    raise InputError(f"no weights {name!r}{hint}")


@cli.command()
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Weights files or NAME.TAG; all that are cached if none."),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(help="What one file's content must hash to.")
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Check weights on disk against their published or recorded hashes."""
    from vitzoo.engine.report import console
    from vitzoo.zoo import download
    from vitzoo.zoo.files import check_weights, sha256_of, verify_file
    from vitzoo.zoo.published import all_entries

    out = console()
    files = [Path(name) for name in names or () if Path(name).is_file()]
    if sha256 is not None and len(files) != 1:
        raise InputError("--sha256 is for one file")
    for path in files:
        check_weights(path)
        basis = verify_file(path, sha256)
        out.print(f"{path}: whole, sha256 {sha256_of(path)} ({basis})", markup=False)
    named = [name for name in names or () if not Path(name).is_file()]
    for name in named:
        if Path(name).is_dir():
            raise InputError(f"{name} is a folder: name the weights file in it")
        if "/" in name or name.endswith((".pth", ".pt", ".bin", ".tar", ".safetensors")):
            raise InputError(f"there is no weights file {name}")
    entries = [_entry(name) for name in named] if names else all_entries()
    cached = 0
    for entry in entries:
        path_found = download.cached(entry, cache_dir=cache_dir)
        if path_found is None:
            if named:
                out.print(f"{entry.name}: not in the cache", markup=False)
            continue
        cached += 1
        out.print(f"{entry.name}: verified, {path_found}", markup=False, soft_wrap=True)
    if not names:
        out.print(f"{cached} of the table's {len(entries)} weights are in the cache")


@cli.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A weights file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="NAME, unless the file's name says it; NAME.TAG if it is that published file, "
            "whose origin and licence the folder then states."
        ),
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Option("--arg", help="KEY=VALUE that the model is built with.")
    ] = None,
) -> None:
    """Turn an authors' file into a folder that timm loads (local-dir: and hf-hub:)."""
    from omegaconf import OmegaConf

    import vitzoo  # noqa: F401  (registers the names)
    from vitzoo.engine.report import console
    from vitzoo.zoo.convert import convert as run

    strangers = [text for text in arguments or () if "=" not in text]
    if strangers:
        raise InputError(f"--arg {strangers[0]!r} is not KEY=VALUE")
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(arguments or []))
    except Exception as error:
        # The YAML parser's errors and OmegaConf's share no base.
        text = " ".join(str(error).split())
        raise InputError(f"--arg {' '.join(arguments or [])} is not YAML: {text}") from None
    built = run(source, target, model, arguments=given)
    count = sum(parameter.numel() for parameter in built.parameters())
    console().print(
        f'{target}: {count:,} parameters; timm.create_model("local-dir:{target}", pretrained=True)',
        markup=False,
        soft_wrap=True,
    )


@cli.command()
def info(
    file: Annotated[Path, typer.Argument(help="A weights file, or a converted folder.")],
    names: Annotated[bool, typer.Option("--names", help="Also every tensor's name.")] = False,
) -> None:
    """Say what a weights file holds and which models it may be for."""
    import vitzoo
    from vitzoo.engine.report import console
    from vitzoo.zoo.convert import look_into, models_of_size
    from vitzoo.zoo.resolve import weights_in

    facts = look_into(weights_in(file) if file.is_dir() else file)
    records = [vitzoo.info(name) for name in vitzoo.list_models()]
    near = models_of_size(facts.params, records)
    out = console()
    for key in ("path", "size", "sha256", "wrapper", "prefix", "tensors", "params", "dtypes"):
        value = getattr(facts, key)
        text = f"{value:,}" if isinstance(value, int) else value
        text = ", ".join(text) if isinstance(text, tuple) else text
        if text is not None:
            out.print(f"{key:>9}  {text}", markup=False, soft_wrap=True)
    out.print(f"   models  {', '.join(near) or 'none has exactly this many parameters'}")
    if names:
        for name, shape in facts.shapes.items():
            out.print(f"{name}  {shape}", markup=False, soft_wrap=True)


@cli.command()
def push(
    folder: Annotated[Path, typer.Argument(help="As `vitzoo weights convert` writes it.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
) -> None:
    """Upload a converted folder with its card to the hub."""
    from vitzoo.engine.report import console
    from vitzoo.zoo.model_card import push as run

    console().print(run(folder, repo, private=private), markup=False, soft_wrap=True)
