"""Every command answers bad input with one sentence: no traceback, no hang, and no output at its final name.

A line of the table is a command line; words in braces stand for files of the fixture `inputs`. Most lines are slow
tests, a sample of them is not.
"""

import shlex
import signal
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from primeflow_perturbench.cli import main

SECONDS = 10
# Every this many lines are in the fast sample.
SAMPLE = 16
# Files that only a command that ends well may leave behind.
OUTPUTS = (
    *("*.part", "*.ckpt", "*.h5ad", "*.parquet", "*.html", "*.safetensors"),
    *("out.csv", "table.csv", "summary.csv", "trial.json", "config.json"),
)

TRAIN = """train model=primeflow_small data.data.filename={screen} data.data_iter_factory.covariate_keys=[cell_type]
data/splitter=transfer trainer.max_steps=1 trainer.val_check_interval=1 data.loader.batch_size=32 hydra.run.dir=out
model.sampler.cells_per_condition=2 model.sampler.calibration_cells=2 references=[control] shape=[]"""
PREDICT = """predict ckpt_path={checkpoint} prediction_dataframe_path={table} n_cells=2 output_path=out/cells.h5ad
hydra.run.dir=log"""
EVALUATE = "evaluate --covariate-keys cell_type --output out"
SAMPLER = """
model.sampler.guidance=-1
model.sampler.guidance=nan
model.sampler.guidance=inf
model.sampler.guidance=strong
model.sampler.guidance=true
model.sampler.control_start=0
model.sampler.control_start=1
model.sampler.control_start=nan
model.sampler.control_start=half
model.sampler.detection_limit=-1
model.sampler.detection_limit=magic
model.sampler.detection_limit=nan
model.sampler.calibrate=yes
model.sampler.calibrate=true
model.sampler.calibration_cells=0
model.sampler.calibration_cells=2.5
model.sampler.calibration_cells=many
model.sampler.sample_batch_size=0
model.sampler.sample_batch_size=large
model.sampler.compile=maybe
model.sampler.solver.method=leapfrog
model.sampler.solver.steps=0
model.sampler.solver.steps=2.5
model.sampler.solver.steps=many
model.sampler.solver.rtol=0
model.sampler.solver.atol=nan
model.sampler.solver=euler
model.sampler=fast
model.sampler.gidance=2
+model.sampler.gidance=2
"""
# Added to the command line of TRAIN; {screen} is a good file.
TRAINING = f"""
{SAMPLER}
model.sampler.cells_per_condition=0
model.sampler.cells_per_condition=1.5
model.lr=nan
model.lr=-1
model.lr=inf
model.lr=fast
model.lr=null
model.wd=-1
model.wd=none
model.seed=x
model.network.width=0
model.network.width=-1
model.network.width=1.5
model.network.width=wide
model.network.width=null
model.network.depth=0
model.network.expansion=0
model.network.embedding_width=0
model.network.functions=-1
model.network.direct=yes
+model.network.foo=1
model.network=mlp
model.network=null
model/network=nlp
model/network=unet model.network.multipliers=2
model/network=unet model.network.multipliers=[]
model/network=unet model.network.multipliers=[0]
model/network=unet model.network.channels=0
model/network=unet model.network.blocks=0
model/network=unet model.network.genes.initial_vectors=absent.parquet
model/network=unet model.network.genes.initial_vectors={{text}}
model/network=unet model.network.genes.initial_vectors={{folder}}
model/space=pc
model/space=pca model.space.n_components=0
model/space=pca model.space.n_components=100000
model/space=pca model.space.fit_cells=0
model.space=null
model/conditions=external
model/conditions=external perturbation_embeddings_path=absent.parquet
model/conditions=external perturbation_embeddings_path={{text}}
model/conditions=external perturbation_embeddings_path={{folder}}
model/conditions=external perturbation_embeddings_path={{table}}
model/conditions=external perturbation_embeddings_path=[]
model/conditions=external model.conditions.width=0
model.conditions.continuous=[cell_type]
model.conditions.continuous={{{{cell_type: log1p}}}}
model.conditions.continuous={{{{dose: log}}}}
model.conditions=null
model.objective.condition_dropout=-0.1
model.objective.condition_dropout=1
model.objective.condition_dropout=nan
model.objective.source=noise
model.objective.source_noise=-1
model.objective.source_cells=0
model.objective.coupling=optimal
model.objective.precondition=maybe
model.objective.source=control model.objective.precondition=true
model.objective.source=control model.sampler.control_start=0.5
model.objective.condition_dropout=0 model.sampler.guidance=2
model.objective=null model.objective.source=control
model.lr_scheduler.conf.warmup_steps=-1
model.lr_scheduler.conf.warmup_steps=x
model.lr_scheduler.conf.total_steps=0
model._target_=os.path.join
model._target_=absent.module.Model
model._target_=primeflow_perturbench.model.PRiMeFlo
model=null
model=primflow
model=latent_additive
model.foo=1
trainer.max_steps=0
trainer.max_steps=-5
trainer.max_steps=2.5
trainer.max_steps=many
trainer.max_steps=null
trainer.max_steps=-1
trainer.val_check_interval=0
trainer.val_check_interval=-1
trainer.val_check_interval=often
trainer.val_check_interval=1.5
trainer.accumulate_grad_batches=0
trainer.accumulate_grad_batches=1.5
trainer.accelerator=gpu
trainer.accelerator=quantum
trainer.devices=0
trainer.devices=-3
trainer.devices=none
trainer.precision=12
trainer.precision=half
trainer.gradient_clip_val=-1
trainer.gradient_clip_val=nan
trainer.log_every_n_steps=0
trainer.deterministic=maybe
+trainer.strategy=magic
+trainer.num_nodes=0
+trainer.foo=1
trainer=gpu
data.loader.batch_size=0
data.loader.batch_size=-4
data.loader.batch_size=1.5
data.loader.batch_size=all
data.loader.num_workers=-1
data.loader.num_workers=two
+data.loader.foo=1
data.loader=null data.loader.batch_size=3
callbacks.ema.decay=1
callbacks.ema.decay=-0.1
callbacks.ema.decay=nan
callbacks.ema.decay=x
callbacks.model_checkpoint.save_top_k=-2
callbacks.model_checkpoint.save_top_k=x
callbacks.model_checkpoint.every_n_train_steps=-1
callbacks.model_checkpoint.save_last=maybe
callbacks.progress_bar.refresh_rate=-1
+callbacks.x._target_=absent.Callback
callbacks=foo
logger=foo
seed=-1
seed=a
seed=1.5
seed=1e20
seed=99999999999
train=maybe
test=no
check=off
finetune=maybe
finetune=true
train=false
trust_checkpoint=maybe
references=[magic]
references=control
references=5
shape=[magic]
shape=all
label=[a]
objective=5
objective={{{{mmd: much}}}}
challenge=5
challenge.counts=maybe
challenge.round=1
finetuning=5
finetuning.freeze=[magic]
finetuning.freeze=5
finetuning.freeze=[genes,conditions,trunk]
finetuning.lr_factor={{{{genes: -1}}}}
finetuning.lr_factor={{{{magic: 1}}}}
finetuning.lr_factor=5
prepare=5
prepare={{{{_target_: absent.prepare}}}}
ckpt_path=absent.ckpt
ckpt_path={{folder}}
ckpt_path={{text}}
ckpt_path={{empty}}
ckpt_path={{screen}}
ckpt_path=absent.ckpt train=false
ckpt_path={{text}} train=false
ckpt_path={{text}} finetune=true
ckpt_path={{checkpoint}} train=false model.network.width=8
ckpt_path={{checkpoint}} model.network.width=8 trainer.max_steps=5
hydra.run.dir={{text}}/run
hydra.run.dir={{text}}
hydra.run.dir=/proc/run
paths.output_dir={{text}}/run
data=foo
data=atlas
data=atlas data.data.filename=absent.yaml test=false
data=atlas data.data.filename={{bomb}} test=false
data=atlas data.data.filename={{nested}} test=false
data=atlas data.data.filename={{list}} test=false
data.data.filename=absent.h5ad
data.data.filename={{folder}}
data.data.filename={{text}}
data.data.filename={{empty}}
data.data.filename={{cut}}
data.data.filename={{table}}
data.data.filename={{bomb}}
data.data.filename=null
data.data.filename=''
data.data.filename=[a]
data.data.filename='"x [a] [/b].h5ad"'
data.data.filename='"ünïcode :dna:.h5ad"'
data.data.filename=https://example.org/x.h5ad
data.data.filename=a=b.h5ad
data.data.filename=~/x.h5ad
data.data.backed=maybe
data.mode=cell
data.filter_split_perturbations=maybe
data.data_iter_factory.perturbation_key=gene
data.data_iter_factory.perturbation_key=null
data.data_iter_factory.perturbation_key=[condition]
data.data_iter_factory.covariate_keys=cell_type
data.data_iter_factory.covariate_keys=[cell_typ]
data.data_iter_factory.covariate_keys=[condition]
data.data_iter_factory.covariate_keys=[[cell_type]]
data.data_iter_factory.covariate_keys=5
data.data_iter_factory.perturbation_control_value=ctrl
data.data_iter_factory.perturbation_control_value=null
data.data_iter_factory.perturbation_combination_delimiter=[+]
data.data_iter_factory.embedding_key=X_absent
data.data_iter_factory.feature_filter_path=absent.csv
data.data_iter_factory.feature_filter_path={{folder}}
data.data_iter_factory.feature_filter_path={{empty}}
data.data_iter_factory.feature_filter_path={{text}}
data.data_iter_factory.perturbation_embeddings_path=absent.parquet
data.data_iter_factory.perturbation_embeddings_path={{text}}
data.data_iter_factory.foo=1
+data.data_iter_factory.foo=1
data/splitter=foo
data/splitter=null
data.splitter=null
data.splitter.task=foo
data.splitter.task=null
data.splitter.min_train_covariates=-1
data.splitter.min_train_covariates=100
data.splitter.max_heldout_covariates=0
data.splitter.max_heldout_fraction_per_covariate=2
data.splitter.max_heldout_fraction_per_covariate=nan
data.splitter.max_heldout_fraction_per_covariate=0
data.splitter.train_control_fraction=1.5
data.splitter.train_control_fraction=half
data.splitter.downsample_fraction=0
data.splitter.downsample_fraction=-1
data.splitter.splitter_seed=x
data.splitter.splitter_seed=-1
data.splitter.save=maybe
data.splitter.save=false
+data.splitter.foo=1
data/splitter=saved
data/splitter=saved data.splitter.split_path=absent.csv
data/splitter=saved data.splitter.split_path={{folder}}
data/splitter=saved data.splitter.split_path={{empty}}
data/splitter=saved data.splitter.split_path={{text}}
data/splitter=saved data.splitter.split_path={{binary}}
data/splitter=saved data.splitter.split_path={{table}}
data/splitter=combine_inverse
data.evaluation.evaluation_pipelines=5
data.evaluation.evaluation_pipelines=[5]
data.evaluation.evaluation_pipelines=[{{{{foo: 1}}}}]
data.evaluation.evaluation_pipelines=[{{{{aggregation: magic, metric: mmd}}}}]
data.evaluation.evaluation_pipelines=[{{{{aggregation: none, metric: magic}}}}]
data.evaluation.evaluation_pipelines=[]
data.evaluation.chunk_size=0
data.evaluation.chunk_size=x
data.evaluation.split_value_to_evaluate=magic
data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=0
data.evaluation.test_data_iter_factory.max_control_cells_per_covariate=x
experiment=quickstrat
experiment=search/primeflow_fast data.data.filename=absent.h5ad
foo
foo=
=3
seed=[1
seed=1,2
~foo
~model.foo
+seed=1
'seed=${{{{foo}}}}'
'run_name=${{{{foo.bar}}}}'
model.network.width='${{{{model.network.width}}}}'
modle=primeflow
--foo
--cfg
--cfg jb
--config-name absent
--config-dir absent
--multirun --cfg job
"""
PREDICTION = f"""
{SAMPLER}
n_cells=0
n_cells=-1
n_cells=2.5
n_cells=many
n_cells=nan
n_cells=1000000000000000000
n_cells=null
controls=no
controls=maybe
controls=true control_cells=0
controls=true control_cells=x
per_condition=maybe
per_condition=true
seed=-1
seed=x
model.lr=1
+model.lr=1
model.network.width=3
accelerator=gpu
accelerator=quantum
precision=64-true
precision=half
challenge.round_to=much
challenge.round_to=-1
challenge.round_to=0
challenge.round_to=nan
challenge.target_sum=-1
challenge.target_sum=x
challenge.knock_down=maybe
challenge.counts=maybe
challenge.counts=true
challenge.counts=true challenge.controls_path=absent.h5ad
challenge.counts=true challenge.controls_path={{text}}
challenge.counts=true challenge.controls_path={{screen}}
challenge.counts=true challenge.controls_path={{screen}} challenge.counts_layer=magic
challenge.control_cells=0
challenge.control_cells=2.5
challenge.control_guidance=-1
challenge.control_guidance=nan
challenge.foo=1
output_path={{text}}
output_path={{text}}/cells.h5ad
output_path={{screen}}
output_path=/proc/cells.h5ad
output_path=null
output_path=[a]
per_condition=true output_path={{text}}
per_condition=true output_path={{text}}/folder
hydra.run.dir={{text}}/log
ckpt_path=null
ckpt_path=absent.ckpt
ckpt_path={{folder}}
ckpt_path={{text}}
ckpt_path={{empty}}
ckpt_path={{binary}}
ckpt_path={{screen}}
ckpt_path={{cut_checkpoint}}
ckpt_path={{pickle}}
trust_checkpoint=maybe
prediction_dataframe_path=null
prediction_dataframe_path=absent.csv
prediction_dataframe_path={{folder}}
prediction_dataframe_path={{empty}}
prediction_dataframe_path={{binary}}
prediction_dataframe_path={{screen}}
foo
foo=1
n_cels=3
"""
TABLES = {
    "header alone": "cell_type,condition\n",
    "no condition": "cell_type,perturbation\nalpha,G0\n",
    "no covariate": "condition\nG0\n",
    "unknown label": "cell_type,condition\nalpha,NOVEL\n",
    "unknown covariate": "cell_type,condition\nomega,G0\n",
    "other case": "cell_type,condition\nalpha,g0\n",
    "control misspelt": "cell_type,condition\nalpha,Control\n",
    "tabs": "cell_type\tcondition\nalpha\tG0\n",
    "semicolons": "cell_type;condition\nalpha;G0\n",
    "column twice": "cell_type,condition,condition\nalpha,G0,G1\n",
    "row twice": "cell_type,condition\nalpha,G0\nalpha,G0\n",
    "combination twice": "cell_type,condition\nalpha,G0+G1\nalpha,G1+G0\n",
    "more fields than names": "cell_type,condition\nx,alpha,G0\n",
    "a longer row": "cell_type,condition\nalpha,G0\nalpha,G1,x\n",
    "a shorter row": "cell_type,condition\nalpha,G0\nalpha\n",
    "a blank value": "cell_type,condition\nalpha,\n",
    "a blank space": "cell_type,condition\nalpha,  \n",
    "empty part": "cell_type,condition\nalpha,G0+\n",
    "delimiter alone": "cell_type,condition\nalpha,+\n",
    "open quote": 'cell_type,condition\nalpha,"G0\n',
    "zero bytes": "cell_type,condition\nalpha,G0\0\n",
    **{
        f"n_cells {n}": f"cell_type,condition,n_cells\nalpha,G0,{n}\n"
        for n in ("0", "-1", "2.5", "many", "nan", "inf", "1e30", "1e18", "9999999999999999999", "", "true")
    },
}
OTHERS = """
evaluate absent.h5ad {screen} --output out
evaluate {screen} absent.h5ad --output out
evaluate {folder} {screen} --output out
evaluate {text} {screen} --output out
evaluate {screen} {text} --output out
evaluate {empty} {screen} --output out
evaluate {cut} {screen} --output out
evaluate {screen} {cut} --output out
evaluate {screen} {screen} --output {text}
evaluate {screen} {screen} --output {text}/x
evaluate {screen} {screen} --output out --perturbation-key gene
evaluate {screen} {screen} --output out --covariate-keys cell_typ
evaluate {screen} {screen} --output out --covariate-keys condition
evaluate {screen} {screen} --output out --control ctrl
evaluate {screen} {screen} --output out --pipelines papper
evaluate {screen} {other_genes} --output out --covariate-keys cell_type
evaluate {other_genes} {screen} --output out --covariate-keys cell_type
evaluate {controls} {screen} --output out --covariate-keys cell_type
evaluate {screen} {controls} --output out --covariate-keys cell_type
evaluate {screen} {screen} --output out --profile vcc2024
evaluate {screen} {screen} --output out --profile vcc2025 --covariate-keys cell_type
evaluate {screen} {screen} --output out --profile vcc2025 --predicted-layer magic
evaluate {screen} {screen} --output out --timeout soon
evaluate {screen}
evaluate
evaluate {screen} {screen} {screen}
evaluate {screen} {screen} --sinthetic-controls
data
data chek {screen}
data check
data check absent.h5ad
data check {folder}
data check {text}
data check {empty}
data check {cut}
data check {binary}
data check {table}
data check 'x [a] [/b].h5ad'
data check {screen} --perturbation-key gene
data check {screen} --control ctrl
data check {screen} --covariate-keys cell_typ
data check {screen} --covariate-keys condition
data check {screen} --covarate-keys cell_type
data check {screen} {screen}
data check absent.yaml
data check {bomb}
data check {nested}
data check {list}
data check {empty_yaml}
data check {binary_yaml}
data check {folder_yaml}
data preprocess
data preprocess {counts}
data preprocess absent.h5ad out.h5ad
data preprocess {folder} out.h5ad
data preprocess {text} out.h5ad
data preprocess {empty} out.h5ad
data preprocess {cut} out.h5ad
data preprocess {screen} out.h5ad
data preprocess {counts} {counts}
data preprocess {counts} {text}/out.h5ad
data preprocess {counts} {folder}
data preprocess {counts} /proc/out.h5ad
data preprocess {counts} out.h5ad --counts-layer magic
data preprocess {counts} out.h5ad --n-top-genes -3
data preprocess {counts} out.h5ad --n-top-genes 2.5
data preprocess {counts} out.h5ad --n-top-genes many
data preprocess {counts} out.h5ad --n-de-genes -1
data preprocess {counts} out.h5ad --n-de-genes x
data preprocess {counts} out.h5ad --target-sum 0
data preprocess {counts} out.h5ad --target-sum -1
data preprocess {counts} out.h5ad --target-sum nan
data preprocess {counts} out.h5ad --target-sum inf
data preprocess {counts} out.h5ad --target-sum x
data preprocess {counts} out.h5ad --library-size-key magic
data preprocess {counts} out.h5ad --library-size-key condition
data preprocess {counts} out.h5ad --library-size-key
data preprocess {counts} out.h5ad --perturbation-key gene
data preprocess {counts} out.h5ad --control ctrl
data preprocess {counts} out.h5ad --covariate-keys cell_typ
data split
data split {screen} out.csv
data split absent.h5ad out.csv --context cell_type=alpha --task set_apart
data split {text} out.csv --context cell_type=alpha --task set_apart
data split {screen} {screen} --context cell_type=alpha --task set_apart
data split {screen} {text} --context cell_type=alpha --task set_apart
data split {screen} {table} --context cell_type=alpha --task set_apart
data split {screen} {folder} --context cell_type=alpha --task set_apart
data split {screen} {text}/out.csv --context cell_type=alpha --task set_apart
data split {screen} out.csv --context cell_type --task set_apart
data split {screen} out.csv --context =alpha --task set_apart
data split {screen} out.csv --context cell_type=omega --task set_apart
data split {screen} out.csv --context line=alpha --task set_apart
data split {screen} out.csv --context --task set_apart
data split {screen} out.csv --context cell_type=alpha --task magic
data split {screen} out.csv --context cell_type=alpha
data split {screen} out.csv --context cell_type=alpha --test-perturbations absent.csv
data split {screen} out.csv --context cell_type=alpha --test-perturbations {folder}
data split {screen} out.csv --context cell_type=alpha --test-perturbations {empty}
data split {screen} out.csv --context cell_type=alpha --test-perturbations {text}
data split {screen} out.csv --context cell_type=alpha --test-perturbations {binary}
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --val-fraction -1
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --val-fraction 2
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --val-fraction nan
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --val-fraction x
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --seed -1
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --seed 1.5
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --perturbation-key gene
data split {screen} out.csv --context cell_type=alpha --test-perturbations {labels} --control ctrl
data download
data download norman
data download norman19 --folder {text}
data download norman19 --folder /proc/x
share
share {checkpoint}
share absent.ckpt --output out
share {folder} --output out
share {text} --output out
share {empty} --output out
share {screen} --output out
share {cut_checkpoint} --output out
share {pickle} --output out
share {checkpoint} --output {text}
share {checkpoint} --output {text}/model
share {checkpoint} --output {folder}
share {checkpoint} --output {folder} --overwrite
share {checkpoint} --output /proc/model
share {checkpoint} --output out --licence x
leaderboard
leaderboard absent
leaderboard {text}
leaderboard {folder}
leaderboard {run} --output {text}
leaderboard {run} --output {text}/x
leaderboard {run} --output out --figures x
leaderboard {run} --output out --figures -1
leaderboard {run} --output out --baseline magic
leaderboard {run} --output out --published magic
leaderboard {run} --output out --conditions magic
leaderboard {run} --output out --models magic
leaderboard {run} absent --output out
leaderboard {damaged_run} --output out
leaderboard {run} --outptu out
sweep
sweep foo
sweep ablation=magic data.data.filename={screen}
sweep ablation=guidance
sweep experiment=magic
sweep model=magic data.data.filename={screen}
sweep modle=primeflow data.data.filename={screen}
sweep seed=0,1 data.data.filename={screen} --output {text}
sweep seed=0,1 data.data.filename={screen} --output {text}/x
sweep seed=0,1 data.data.filename={screen} hydra/launcher=magic
sweep seed=0,1 data.data.filename={screen} hydra/launcher=ray
sweep seed=0,1 data.data.filename={screen} hydra/sweeper=optuna_tpe
sweep seed=0,1 --dry-rnu
sweep =3
trian
--foo
-x
'' x
predict
predict ckpt_path={checkpoint}
train
train --hlep
"""


def lines(table: str, command: str = "") -> list[str]:
    return [f"{command} {line}".strip() for line in table.strip().splitlines() if line.strip()]


CASES = [
    *lines(TRAINING, " ".join(TRAIN.split())),
    *lines(PREDICTION, " ".join(PREDICT.split())),
    *(f"{' '.join(PREDICT.split())} prediction_dataframe_path={{odd}}/{number}.csv" for number in range(len(TABLES))),
    *lines(OTHERS),
]
# Bare commands that show their help.
HELP = ("data",)
CASES = [case for case in CASES if case not in HELP]


def identifier(case: str) -> str:
    for start in (TRAIN, PREDICT):
        case = case.replace(" ".join(start.split()), start.split()[0] + ":")
    return case


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Paths of good and bad files by name; the run is trained once."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = {name: folder / name for name in ("text", "empty", "binary", "folder", "odd")}
    paths["text"].write_text("neither a table nor settings\n")
    paths["empty"].touch()
    paths["binary"].write_bytes(bytes(range(256)) * 4)
    paths["folder"].mkdir()
    (paths["folder"] / "file").touch()
    paths["odd"].mkdir()
    for number, content in enumerate(TABLES.values()):
        (paths["odd"] / f"{number}.csv").write_text(content)
    for name, content in {
        "table.csv": "cell_type,condition\nalpha,G0\n",
        "labels.csv": "G0\n",
        "bomb.yaml": "files: &f0 [x, x]\n" + "".join(f"a{i}: &f{i} [{f'*f{i - 1}, ' * 10}]\n" for i in range(1, 9)),
        "nested.yaml": "[" * 5000,
        "list.yaml": "- a\n- b\n",
        "empty_yaml.yaml": "",
    }.items():
        paths[name.partition(".")[0]] = folder / name
        (folder / name).write_text(content)
    paths["binary_yaml"] = folder / "binary_yaml.yaml"
    paths["binary_yaml"].write_bytes(bytes(range(256)))
    paths["folder_yaml"] = folder / "folder.yaml"
    paths["folder_yaml"].mkdir()
    paths |= cells(folder)
    paths["run"] = folder / "run"
    arguments = shlex.split(" ".join(TRAIN.split()).format_map({"screen": str(paths["screen"])}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status, printed = call(patch, [*arguments, f"hydra.run.dir={paths['run']}"], seconds=100)
    assert status == 0, printed
    paths["checkpoint"] = paths["run"] / "checkpoints" / "last.ckpt"
    paths["cut_checkpoint"] = folder / "cut.ckpt"
    paths["cut_checkpoint"].write_bytes(paths["checkpoint"].read_bytes()[:5000])
    paths["pickle"] = folder / "pickle.ckpt"
    paths["pickle"].write_bytes(b"cos\ngetcwd\n(tR.")
    paths["damaged_run"] = folder / "damaged_run"
    paths["damaged_run"].mkdir()
    for name in ("environment.json", "table.csv", "per_condition.parquet", "config.yaml"):
        (paths["damaged_run"] / name).write_text("[" * 2000)
    return {name: str(path) for name, path in paths.items()}


def cells(folder: Path) -> dict[str, Path]:
    """Small screens: a good one, one of counts, one of other genes, one of controls alone, and one cut short."""
    rng = np.random.default_rng(0)
    labels = [
        label for label in ("control", "G0", "G1", "G2", "G3", "G4") for _ in range(12 if label == "control" else 6)
    ]
    obs = pd.DataFrame({"condition": labels * 3, "cell_type": np.repeat(["alpha", "beta", "gamma"], len(labels))})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    counts = rng.poisson(2.0, (len(obs), 24)).astype(np.float32)
    var = pd.DataFrame(index=[f"gene{i}" for i in range(24)])
    logged = ad.AnnData(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 100), obs=obs, var=var)
    found = {
        "screen": logged,
        "counts": ad.AnnData(counts, obs=obs, var=var),
        "other_genes": ad.AnnData(logged.X, obs=obs, var=pd.DataFrame(index=[f"other{i}" for i in range(24)])),
        "controls": logged[logged.obs["condition"] == "control"].copy(),
    }
    for name, adata in found.items():
        adata.write_h5ad(folder / f"{name}.h5ad")
    (folder / "cut.h5ad").write_bytes((folder / "screen.h5ad").read_bytes()[:3000])
    return {name: folder / f"{name}.h5ad" for name in (*found, "cut")}


class TooLong(BaseException):
    """A command took longer than `SECONDS`."""


def call(monkeypatch, arguments: list[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Exit status of a command in this process, and what it raised, if anything."""

    def stop(*_):
        raise TooLong

    monkeypatch.setattr(sys, "argv", ["primeflow", *arguments])
    monkeypatch.delenv("PRIMEFLOW_DEBUG", raising=False)
    # Seconds of this process, because the machine may be busy; a command that only waits ends after more.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 6 * seconds)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0, ""
    except BaseException as error:
        return -1, f"{type(error).__name__}: {error}"
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    return 0, ""


def test_the_table_is_long_and_has_no_line_twice():
    assert len(CASES) >= 300
    assert len(set(CASES)) == len(CASES)
    commands = {case.split()[0] for case in CASES}
    assert {"train", "predict", "evaluate", "data", "share", "leaderboard", "sweep"} <= commands


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=identifier(case), marks=[pytest.mark.slow] * (number % SAMPLE != 0))
        for number, case in enumerate(CASES)
    ],
)
def test_bad_input_is_one_sentence(case, inputs, tmp_path, monkeypatch, capfd):
    before = {path: path.read_bytes() for path in map(Path, inputs.values()) if path.is_file()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, raised = call(monkeypatch, shlex.split(case.format_map(inputs)))
    printed = capfd.readouterr()
    text = f"{printed.out}{printed.err}{raised}"
    left = [path.name for pattern in OUTPUTS for path in tmp_path.rglob(pattern)]
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    faults = {
        "raised": raised != "",
        f"status {status}": status not in (1, 2),
        "traceback": any(words in text for words in ("Traceback", "unexpected error", "HYDRA_FULL_ERROR")),
        "no sentence": "error: " not in text,
        f"left {left}": bool(left),
        f"changed {changed}": bool(changed),
    }
    assert [fault for fault, found in faults.items() if found] == [], text[-500:]
