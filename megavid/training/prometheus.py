"""The figures of the last step as a text file that Prometheus' node exporter collects (its textfile collector).

Owns the names and the form. Each write replaces the file whole, as the collector asks.
"""

from pathlib import Path

from megavid.training.callbacks import Callback, Run, speed_figures
from megavid.training.run_dir import write_whole
from megavid.training.step import StepReport

HELP = {
    "step": "Optimizer steps taken.",
    "loss": "Loss of the last step.",
    "grad_norm": "Gradient norm of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "step_seconds": "Time of the last step.",
    "data_wait_seconds": "Time that rank 0 waited for data in the last step.",
    "tokens_per_second": "Tokens of clips in a second, all ranks.",
    "skipped_steps_total": "Steps skipped for numbers that are not finite.",
    "mfu": "Share of the dense bf16 peak, model FLOPs alone.",
    "tflops_per_rank": "Model TFLOP/s of a rank.",
}


class PrometheusFile(Callback):
    """Writes the file (rank 0)."""

    def __init__(self, file: Path) -> None:
        """Name it; its folder must exist."""
        self.file = file

    def after_step(self, run: Run, report: StepReport) -> None:
        """Replace it."""
        speed = speed_figures(report, run.mesh.world_size, run.peak)
        values = {
            "step": report.step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "step_seconds": report.step_time_s,
            "data_wait_seconds": report.data_wait_s,
            "tokens_per_second": report.tokens_per_s,
            "skipped_steps_total": run.state.skipped,
            "mfu": speed["mfu"],
            "tflops_per_rank": speed["tflops_per_rank"],
        }
        write_whole(self.file, prometheus_text(values, run.run_dir.path.resolve().name))


def prometheus_text(values: dict[str, float | None], run: str) -> str:
    """Prometheus' text format; what nobody measured is left out, what is not finite is NaN, as the format knows it."""
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        kind = "counter" if name.endswith("_total") else "gauge"
        text = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(repr(float(value)), repr(float(value)))
        lines += [f"# HELP megavid_{name} {HELP[name]}", f"# TYPE megavid_{name} {kind}"]
        lines.append(f'megavid_{name}{{run="{label}"}} {text}')
    return "\n".join(lines) + "\n"
