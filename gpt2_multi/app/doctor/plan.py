"""The command `plan`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from gpt2_multi.app.backends import BACKENDS
from gpt2_multi.app.terminal import DTYPE, console, print_pieces
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import ARCHIVE
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import DTYPES
from gpt2_multi.model.weights import FSDP, TENSOR, parameter_count

if TYPE_CHECKING:
    from gpt2_multi.app.doctor.memory import Job, Need

RULES = ",".join(f"{axis}={over}" for axis, over in (FSDP | TENSOR).items())


@click.command()
@click.argument("model")
@click.option("--mesh", "meshes", multiple=True, help="Such as data=2,fsdp=2,tensor=2; several are compared.")
@click.option("--rules", default=RULES, show_default=True, help="Which axis of the mesh cuts an axis of the weights.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Rows of all devices.")
@click.option("--length", type=click.IntRange(1), help="Tokens of a row. Default: all that the model reads.")
@DTYPE
@click.option("--param-dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
              help="What parameters are stored in while it trains.")  # fmt: skip
@click.option("--optimizer", type=click.Choice(["adamw", "lion", "sgd"]), default="adamw", show_default=True)
@click.option("--checkpointing", is_flag=True, help="Recompute activations in the backward pass.")
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="pt", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def plan(
    model: str,
    meshes: Sequence[str],
    rules: str,
    batch_size: int,
    length: int | None,
    dtype: str,
    param_dtype: str,
    optimizer: str,
    checkpointing: bool,
    backend: str,
    as_json: bool,
) -> None:
    """Say how many bytes each device of a mesh needs to train MODEL, and to generate with it, on paper.

    MODEL is a published GPT-2 such as gpt2-xl, whose sizes are known without its files, a folder, or a name on the hub.
    No framework is needed, and no device. Activations are those of PyTorch with fused attention; the total is of needs
    that may not all come at once.
    """
    from gpt2_multi.app.doctor.memory import Job, needed

    config = (GPT2Config.from_archive if model in ARCHIVE else GPT2Config.from_pretrained)(model)
    job = Job(
        config, batch_size, length or config.n_positions, dtype, param_dtype, optimizer, checkpointing, backend,
        rules_of(rules),
    )  # fmt: skip
    needs = [needed(job, mesh) for mesh in meshes or ("data=1",)]
    size = parameter_count(config)
    if as_json:
        said = {"model": model, "parameters": size, "batch_size": batch_size, "length": job.length, "dtype": dtype}
        said |= {"param_dtype": param_dtype, "optimizer": optimizer, "checkpointing": checkpointing, "rules": job.rules}
        print_pieces([json.dumps(said | {"backend": backend, "plans": [n.to_dict() for n in needs]}, indent=2)])
    else:
        _show(model, size, job, needs)


def rules_of(text: str) -> dict[str, str]:
    """Rules of a text such as "embed=fsdp,mlp=tensor"; of an empty one there are none."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for axis, _, over in pairs:
        if not axis.strip() or not over.strip():
            raise InputError(f"rules: expected pairs such as embed=fsdp, with commas between, found {text!r}")
    return {axis.strip(): over.strip() for axis, _, over in pairs}


def _show(model: str, size: int, job: Job, needs: Sequence[Need]) -> None:
    """Print a table with a column for each mesh."""
    from rich import box
    from rich.table import Table

    meshes = [",".join(f"{axis}={n}" for axis, n in need.mesh.items() if n > 1) or "one device" for need in needs]
    rows = Table("MB of each device", *meshes, box=box.SIMPLE)
    for column in rows.columns[1:]:
        column.justify = "right"

    def add(name: str, bytes_of: Callable[[Need], int]) -> None:
        rows.add_row(name, *(f"{bytes_of(need) / 1e6:,.1f}" for need in needs))

    for part in needs[0].training:
        add(part, lambda need, part=part: need.training[part])  # type: ignore[misc]
    rows.add_section()
    add("training", lambda need: sum(need.training.values()))
    for way in needs[0].activations:
        add(f"activations {way}", lambda need, way=way: need.activations[way])  # type: ignore[misc]
    rows.add_section()
    add(f"weights in {job.dtype}", lambda need: need.generation["weights"])
    add(f"cache of {job.length} tokens", lambda need: need.generation["cache"])
    add("generation", lambda need: sum(need.generation.values()))
    console().print(
        f"{model}, {size / 1e6:,.1f} million parameters; {job.batch_size} rows of {job.length} tokens in all, computed "
        f"in {job.dtype}, stored in {job.param_dtype}, {job.optimizer}, {'with' if job.checkpointing else 'no'} "
        "checkpointing", markup=False, soft_wrap=True,
    )  # fmt: skip
    console().print(rows)
