"""Picture of a finished run: measured and generated cells of held-out conditions in a PCA of the measured cells.

    python benchmarks/picture.py runs/quickstart/NAME docs/quickstart.png

Shows the conditions with the best, the median and the worst energy distance.
"""

import argparse
from pathlib import Path

import anndata as ad
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import scipy.sparse as sp
from omegaconf import OmegaConf
from sklearn.decomposition import PCA

from primeflow_perturbench.evaluation.score import data_columns
from primeflow_perturbench.training import resolvers

COLORS = {"control": "#b9b9b9", "measured": "#1f77b4", "generated": "#e8702a"}


def dense(adata: ad.AnnData):
    return adata.X.toarray() if sp.issparse(adata.X) else adata.X


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    resolvers.register()
    cfg = OmegaConf.load(options.run / "config.yaml")
    columns = data_columns(cfg)
    perturbation, covariates = columns["perturbation_key"], columns["covariate_keys"]
    measured = ad.read_h5ad(cfg.data.data.filename)
    split = pd.read_csv(options.run / "train_test_split.csv", header=None, index_col=0)[1]
    measured = measured[(split.reindex(measured.obs_names) == "test").to_numpy()]
    generated = ad.read_h5ad(options.run / "predicted.h5ad")
    scores = pd.read_parquet(options.run / "per_condition.parquet")
    model = scores["model"].iloc[0]
    scores = scores[(scores.model == model) & (scores.metric == "mmd_none")].sort_values("value")
    pca = PCA(2, random_state=0).fit(dense(measured))

    def cells_of(adata: ad.AnnData, row, label: str):
        keep = adata.obs[perturbation].astype(str) == label
        for key in covariates:
            keep &= adata.obs[key].astype(str) == str(row[key])
        return pca.transform(dense(adata[keep.to_numpy()]))

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), sharex=True, sharey=True, layout="constrained")
    for axis, position, name in zip(axes, (0, len(scores) // 2, -1), ("best", "median", "worst"), strict=True):
        row = scores.iloc[position]
        label = str(row["perturbation"])
        parts = {
            "control": cells_of(measured, row, columns["perturbation_control_value"]),
            "generated": cells_of(generated, row, label),
            "measured": cells_of(measured, row, label),
        }
        for part, xy in parts.items():
            axis.scatter(*xy.T, s=9, alpha=0.7, linewidths=0, color=COLORS[part], label=part)
        where = ", ".join(str(row[key]) for key in covariates)
        axis.set_title(f"{name}: {label} in {where}\nenergy distance {row['value']:.2f}", fontsize=10)
        axis.set_xlabel("PC 1")
    axes[0].set_ylabel("PC 2")
    axes[0].legend(frameon=False, fontsize=8, markerscale=2)
    figure.savefig(options.picture, dpi=130)


if __name__ == "__main__":
    main()
