"""kd-accel report RUN [RUN ...]: curves, evaluation, examples, config and environment of runs side by side.

kd-accel report runs/teacher runs/student runs/alone
runs/teacher/report.html       one HTML file that needs no network, no script and no file beside it
             metrics.csv       every number of the runs
             report_figures/   the curves as PNG
"""

from __future__ import annotations

from pathlib import Path

from kd_accel.report.confidences import confidence_sections
from kd_accel.report.curves import curve_sections
from kd_accel.report.evaluation import evaluation_section
from kd_accel.report.files import write_csv, write_figures
from kd_accel.report.page import page
from kd_accel.report.retrieval import retrieval_sections
from kd_accel.report.runs import read_runs
from kd_accel.report.settings import config_section, environment_section
from kd_accel.report.summary import summary
from kd_accel.report_config import ReportConfig
from kd_accel.text_files import replace_text

NAMED = 4  # runs in the title; of more their number


def run(config: ReportConfig) -> None:
    """The verb: write the report of `config.runs` and say where it is."""
    runs = [Path(name) for name in config.runs]
    path = write_report(runs, Path(config.output) if config.output else runs[0] / "report.html")
    print(f"report: {path}")


def write_report(paths: list[Path], output: Path) -> Path:
    """Write one self-contained page about the runs to `output`, atomically, and metrics.csv and PNGs beside it.

    Returns `output`. Raises ConfigError for a run directory that does not exist, and without matplotlib.
    """
    runs = read_runs(paths)
    sections = [
        evaluation_section(runs),
        *retrieval_sections(runs),
        *curve_sections(runs),
        *confidence_sections(runs),
        config_section(runs),
        environment_section(runs),
    ]
    title = ", ".join(run.name for run in runs) if len(runs) <= NAMED else f"{len(runs)} runs"
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, page(title, summary(runs), runs, sections))
    write_csv(runs, output.with_name("metrics.csv"))
    write_figures(
        [panel for section in sections for panel in section.panels], output.with_name(f"{output.stem}_figures")
    )
    return output
