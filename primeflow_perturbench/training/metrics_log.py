"""The log of metrics of a run, which a resumed training continues."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from primeflow_perturbench.files import replacing


class MetricsLog(CSVLogger):
    """Lightning's `CSVLogger`, which keeps the rows of a training that goes on in its folder."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the rows."""
        if self._experiment is None:
            self._experiment = MetricsWriter(log_dir=self.log_dir)
        return self._experiment


class MetricsWriter(ExperimentWriter):
    """Writes rows behind those of earlier steps. Rows of later steps, from which training went back, are dropped.

    It overrides `_check_log_dir_exists`, a private method of Lightning that deletes the earlier rows, so pyproject.toml
    caps Lightning's version.
    """

    _begun = False

    def _check_log_dir_exists(self) -> None:
        """Keep the file."""

    def save(self) -> None:
        """Write the rows that are not written yet."""
        if not self.metrics:
            return
        path, rows = Path(self.metrics_file_path), self.metrics
        if not self._begun or not set(self.metrics_keys) >= set().union(*rows):
            earlier = read_rows(path)
            if not self._begun:
                first = min(row["step"] for row in rows)
                earlier = [row for row in earlier if int(row["step"]) < first]
            rows = [*earlier, *rows]
            self.metrics_keys = sorted(set().union(*rows))
            with replacing(path) as temporary:
                temporary.write_text(as_csv(rows, self.metrics_keys, header=True), newline="")
        else:
            with path.open("a", newline="") as file:
                file.write(as_csv(rows, self.metrics_keys, header=False))
        self._begun, self.metrics = True, []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a log of metrics; none if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text()
    # A full disk can have cut the last row.
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    return [row for row in rows if (row.get("step") or "").isdigit()]


def as_csv(rows: list[dict[str, Any]], names: list[str], header: bool) -> str:
    """Rows as CSV with these columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
