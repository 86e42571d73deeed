"""The command `plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
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
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="pt", show_default=True)
@click.option("--memory", help="Of a device, such as 24GB or 24GiB: say what fits.")
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
    backend: str,
    memory: str | None,
    as_json: bool,
) -> None:
    """Say how many bytes each device of a mesh needs to train MODEL, and to generate with it, on paper.

    MODEL is a published GPT-2 such as gpt2-xl, whose sizes are known without its files, a folder, a name on the hub, or
    sizes such as n_layer=6,n_head=6,n_embd=384. No framework is needed, and no device. Activations are those of PyTorch
    with fused attention, without checkpointing, and with it, where the backward pass computes them again. A total is of
    needs that may not all come at once, without what a device's own libraries take.
    """
    from gpt2_multi.app.doctor.memory import Job, needed
    from gpt2_multi.files.containers.safetensors import parse_size

    limit = None if memory is None else parse_size(memory, "memory")
    config = config_of(model)
    job = Job(config, batch_size, length or config.n_positions, dtype, param_dtype, optimizer, backend, rules_of(rules))
    needs = [needed(job, mesh) for mesh in meshes or ("data=1",)]
    size = parameter_count(config)
    if as_json:
        said = {"model": model, "parameters": size, "batch_size": batch_size, "length": job.length, "dtype": dtype}
        said |= {"param_dtype": param_dtype, "optimizer": optimizer, "rules": job.rules, "backend": backend}
        said |= {} if limit is None else {"memory": limit}
        plans = [need.to_dict() | ({} if limit is None else {"fits": need.fits(limit)}) for need in needs]
        print_pieces([json.dumps(said | {"plans": plans}, indent=2)])
    else:
        console().print(
            f"{model}, {size / 1e6:,.1f} million parameters; {job.batch_size} rows of {job.length} tokens in all, "
            f"computed in {job.dtype}, stored in {job.param_dtype}, {job.optimizer}", markup=False, soft_wrap=True,
        )  # fmt: skip
        _show(job, needs, limit, memory)


def config_of(model: str) -> GPT2Config:
    """The configuration of a folder, of a published model, of a name on the hub, or of sizes as `train` takes them."""
    if Path(model).exists():
        return GPT2Config.from_pretrained(model)
    if model in {*ARCHIVE, *(known.hub_id for known in ARCHIVE.values())}:
        return GPT2Config.from_archive(model)
    if "=" not in model:
        return GPT2Config.from_pretrained(model)
    config = GPT2Config()
    config.update_from_string(model)
    return config


def rules_of(text: str) -> dict[str, str]:
    """Rules of a text such as "embed=fsdp,mlp=tensor"; of an empty one there are none."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for axis, _, over in pairs:
        if not axis.strip() or not over.strip():
            raise InputError(f"rules: expected pairs such as embed=fsdp, with commas between, found {text!r}")
    if len({axis.strip() for axis, _, _ in pairs}) < len(pairs):
        raise InputError(f"rules: expected each axis once, found {text!r}; leave one out")
    return {axis.strip(): over.strip() for axis, _, over in pairs}


def _show(job: Job, needs: Sequence[Need], limit: int | None, memory: str | None) -> None:
    """Print a table with a column for each mesh."""
    from rich import box
    from rich.table import Table

    meshes = [",".join(f"{axis}={n}" for axis, n in need.mesh.items() if n > 1) or "one device" for need in needs]
    rows = Table("MB of each device", *meshes, box=box.SIMPLE)
    for column in rows.columns[1:]:
        column.justify = "right"
    for use, parts in needs[0].uses.items():
        for part, name in _names(job, use, parts).items():
            rows.add_row(name, *(f"{need.uses[use][part] / 1e6:,.1f}" for need in needs))
        total = "training without checkpointing" if use == "training" else use
        rows.add_row(total, *(f"{need.totals[use] / 1e6:,.1f}" for need in needs))
        if limit is not None:
            rows.add_row(f"fits in {memory}", *("yes" if need.fits(limit)[use] else "no" for need in needs))
        rows.add_section()
    out = console()
    wide = out.measure(rows, options=out.options.update(max_width=10**6)).maximum
    out.width = max(wide, out.width)  # no digit is cut
    out.print(rows)


def _names(job: Job, use: str, parts: Iterable[str]) -> dict[str, str]:
    """How the table calls what a use needs; with checkpointing, what it needs in the place of something else."""
    if use == "training":
        return {part: part for part in parts}
    if use == "generation":
        return {part: part for part in parts} | {
            "weights": f"weights in {job.dtype}", "cache": f"cache of {job.length} tokens",
        }  # fmt: skip
    return {part: f"{part}, with checkpointing" for part in ("gathered or cast", "activations")}
