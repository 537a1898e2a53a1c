"""Prints the reports of ``measure.compiled.aot`` to the terminal."""

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from efftrain.measure.compiled.aot import CompiledStep
from efftrain.measure.cost.mesh_estimate import Estimate


def show(report: CompiledStep, console: Console) -> None:
    """Prints memory, FLOPs, times and traffic of one device, then the warnings."""
    mesh = ", ".join(f"{axis}={n}" for axis, n in report.mesh.items() if n > 1) or "one device"
    console.print(f"{report.target} on {report.topology}: {report.devices} devices, {mesh}", markup=False)
    console.print(f"compiled in {report.compile_s:.0f} s; all figures are per device and step\n")
    memory = report.memory
    table = Table("memory", "bytes", title_justify="left")
    table.columns[1].justify = "right"
    rows = ("parameters", "optimizer", "other_state", "teacher", "batch", "temporaries")
    for name in rows:
        table.add_row(name.replace("_", " "), decimal(getattr(memory, name)))
    table.add_section()
    share = "" if memory.limit is None else f" of {decimal(int(memory.limit))} ({memory.total / memory.limit:.0%})"
    table.add_row("total, with the program", decimal(memory.total) + share)
    console.print(table)

    console.print(
        f"{report.flops / 1e12:.3g} TFLOPs (counted from the {report.counted_from}), of which "
        f"{report.model_flops / max(report.flops, 1):.0%} model FLOPs; {decimal(int(report.hbm_bytes))} through memory"
    )
    if report.times is None:
        console.print("no step time: the peaks of this device are not known")
    else:
        times = report.times
        console.print(
            f"at least {times.step_s * 1e3:.4g} ms per step, limited by {times.dominant}: "
            f"compute {times.compute_s * 1e3:.4g}, HBM {times.hbm_s * 1e3:.4g}, ICI {times.ici_s * 1e3:.4g} ms "
            "(roofline; a bound, not a measurement)\n"
        )
    if report.collectives:
        table = Table("collective", "mesh axes", "in a loop", "times", "sent", "largest")
        for row in report.collectives:
            place = "yes" if row.in_loop else ""
            axes = ", ".join(row.axes) or "-"
            table.add_row(row.kind, axes, place, str(row.count), decimal(int(row.sent)), decimal(int(row.largest)))
        console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def show_search(ranked: list[Estimate], console: Console, *, first: int = 10) -> None:
    """Prints the ``first`` fastest meshes of a search by formulas."""
    table = Table("mesh", "step", "by", "memory", title=f"{len(ranked)} meshes that fit, estimated by formulas")
    for found in ranked[:first]:
        mesh = ", ".join(f"{axis}={n}" for axis, n in found.mesh.items() if n > 1) or "one device"
        step = f"{found.times.step_s * 1e3:.4g} ms"
        table.add_row(mesh, step, found.times.dominant, decimal(int(found.memory_bytes)))
    console.print(table)
