"""`vitzoo bench ops | models | gpu`; the work is the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cli = typer.Typer(no_args_is_help=True, help="Time operators and models on this machine.")

Threads = Annotated[int, typer.Option(help="Threads of torch.")]


@cli.command()
def ops(
    names: Annotated[list[str] | None, typer.Argument(help="Operators; all if none.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, both.")] = None,
    sweep: Annotated[bool, typer.Option(help="Also let the map grow to 224x224.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds of a case.")] = 15,
    seconds: Annotated[float, typer.Option(help="No new round of a case after so long.")] = 4.0,
    threads: Threads = 2,
    out: Annotated[Path, typer.Option(help="JSON; a table and a plot go beside it.")] = Path(
        "benchmarks/ops.json"
    ),
) -> None:
    """Every operator against its reference and the usual ways to write it, on the CPU."""
    from vitzoo.engine.bench_checks import DIRECTIONS
    from vitzoo.engine.bench_ops import DTYPES, run_ops, write

    report = run_ops(
        names or (),
        dtypes=dtype or DTYPES,
        directions=direction or DIRECTIONS,
        sweep=sweep,
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        say=typer.echo,
    )
    write(report, out)
    typer.echo(f"-> {out}, {out.with_suffix('.md')}")


@cli.command()
def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Models; all with a bar if none.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Time one image from 32 to 1344 pixels instead.")
    ] = False,
    size: Annotated[list[int] | None, typer.Option(help="Sides of the sweep.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Rounds; 15, of the sweep 3.")] = None,
    malloc: Annotated[list[str] | None, typer.Option(help="quiet, default.")] = None,
    linear: Annotated[list[str] | None, typer.Option(help="reference, auto.")] = None,
    out: Annotated[Path, typer.Option(help="JSON; a table goes beside it.")] = Path(
        "benchmarks/models.json"
    ),
) -> None:
    """Whole models against timm's, DeiT-S or ViT-B, on the CPU."""
    from vitzoo.engine.bench_models import MALLOCS, SIZES, run_models, run_sweep, write

    if sweep:
        report = run_sweep(names or (), sizes=size or SIZES, pairs=pairs or 3, say=typer.echo)
    else:
        report = run_models(
            names or (),
            pairs=pairs or 15,
            mallocs=malloc or MALLOCS,
            linear=linear or ("reference", "auto"),
            say=typer.echo,
        )
    write(report, out)
    typer.echo(f"-> {out}, {out.with_suffix('.md')}")


@cli.command()
def gpu(
    enable: Annotated[
        bool, typer.Option("--enable", help="Let `auto` take the kernels that agreed, here.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Nothing new is timed after so long.")] = 450.0,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/gpu.json"),
) -> None:
    """Every operator on this GPU: right against float64, then time and memory."""
    from vitzoo.engine.bench_gpu import run_gpu
    from vitzoo.engine.bench_gpu_table import write

    run_gpu(seconds=seconds, enable=enable, say=typer.echo, save=lambda report: write(report, out))
    typer.echo(f"-> {out}, {out.with_suffix('.md')}")
