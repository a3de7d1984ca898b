"""A folder for --config-dir by a hostile author: what it asks of Hydra is refused in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sparse_lab.cli.main import main
from sparse_lab.errors import UserError
from sparse_lab.sweep.plan import Request
from sparse_lab.sweep.table import check_reserved, words

HEAD = "# @package _global_\n"
SLURM = "hydra/launcher=submitit_slurm"
RAY = "hydra/launcher=ray"
KEY = "a1b2c3d4e5f6"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def conf(tmp_path) -> Path:
    return tmp_path / "conf"


def write(conf: Path, name: str, text: str) -> None:
    path = conf / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def refused(conf: Path, *words: str) -> str:
    """The one line that a request gets."""
    with pytest.raises(UserError) as caught:
        Request.read(["--config-dir", str(conf), *words]).compose([])
    line = str(caught.value)
    assert line.isprintable() and KEY not in line, line
    return line


EXPERIMENTS = {  # what it sets below hydra: the key that the line names, and what else is on the command line
    # a file cannot pass for the command line (15)
    "overrides: {hydra: ['hydra.job.env_set.LD_PRELOAD=x']}, job: {env_set: {LD_PRELOAD: x.so}}": ("overrides.hydra",),
    "overrides: {hydra: [hydra.launcher.setup], task: []}": ("overrides.hydra",),
    "overrides: {hydra: ['hydra.launcher.setup=[]']}, launcher: {setup: [touch x]}": ("overrides.hydra", SLURM),
    "overrides: {hydra: [hydra.launcher.ray.init.runtime_env]}, launcher: {ray: {init: {runtime_env: {pip: [x]}}}}": (
        "overrides.hydra",
        RAY,
    ),
    "overrides: {task: ['seed=3']}": ("overrides.task",),
    "runtime: {cwd: /tmp}": ("runtime.cwd",),
    "runtime: {choices: {hydra/launcher: basic}}": ("runtime.choices",),
    "job: {env_copy: [LD_PRELOAD]}": ("job.env_copy",),
    "job: {env_set: {OMP_TOOL_LIBRARIES: evil.so}}": ("job.env_set.OMP_TOOL_LIBRARIES",),
    "job: {env_set: {WANDB_MODE: 'x y; z'}}": ("job.env_set.WANDB_MODE",),
    "job: {config_name: other}": ("job.config_name",),
    "job: {chdir: true}": ("job.chdir",),
    "searchpath: ['pkg://os']": ("hydra.searchpath",),
    # batch scripts (16)
    "launcher: {teardown: [touch x]}": ("launcher.teardown", SLURM),
    "launcher: {srun_args: ['--task-prolog=x']}": ("launcher.srun_args", SLURM),
    "launcher: {additional_parameters: {wrap: x}}": ("launcher.additional_parameters", SLURM),
    "launcher: {use_srun: false}": ("launcher.use_srun", SLURM),
    "launcher: {python: evil}": ("launcher.python", SLURM),
    r"""launcher: {comment: "${hydra.launcher.partition}", partition: "a\ntouch x"}""": ("launcher.", SLURM),
    r"""launcher: {account: "a\n#SBATCH --wrap=x"}""": ("launcher.account", SLURM),
    "launcher: {partition: '$(touch x)'}": ("launcher.partition", SLURM),
    "launcher: {qos: 'a;touch x'}": ("launcher.qos", SLURM),
    "launcher: {mail_user: [a, b]}": ("launcher.mail_user", SLURM),
    "launcher: {signal_delay_s: '120; x'}": ("launcher.signal_delay_s", SLURM),
    "launcher: {cpus_per_task: 4.5}": ("launcher.cpus_per_task", SLURM),
    "launcher: {submitit_folder: /tmp/x}": ("launcher.submitit_folder", SLURM),
    "launcher: {name: ../../x}": ("launcher.name", SLURM),
    "launcher: {'a b': 1}": ("launcher.a b", SLURM),
    "launcher: {'partition.x': 1}": ("launcher.partition.x", SLURM),
    "launcher: {5: 1}": ("launcher.5", SLURM),
    "launcher: {ray: {init: {address: 'ray://evil:10001'}}}": ("ray.init.address", RAY),
    "launcher: {ray: {init: {include_dashboard: true, dashboard_host: 0.0.0.0}}}": ("ray.init.include_dashboard", RAY),
    "launcher: {ray: {init: {_temp_dir: /tmp/x}}}": ("ray.init._temp_dir", RAY),
    "launcher: '${evil}'": ("hydra.launcher",),
    # logging (17)
    "job_logging: {root: {handlers: [x]}}": ("job_logging.root.handlers",),
    "job_logging: {formatters: {x: {class: x.y}}}": ("job_logging.formatters",),
    "job_logging: {filters: {x: {(): x.y}}}": ("job_logging.filters",),
    "hydra_logging: {handlers: {x: {class: logging.FileHandler, filename: x}}}": ("hydra_logging.handlers",),
    "hydra_logging: {loggers: {x: {handlers: [x], level: INFO}}}": ("hydra_logging.loggers.x.handlers",),
    "job_logging: {root: {level: 'ext://os.x'}}": ("job_logging.root.level",),
    "verbose: '${oc.env:HOME}/x'": ("hydra.verbose",),
    # where Hydra writes (18)
    "run: {dir: victim}, output_subdir: '.'": ("hydra.run.dir",),
    "output_subdir: '.'": ("hydra.output_subdir",),
    "sweep: {dir: /tmp/x}": ("hydra.sweep.dir", "-m"),
    "sweep: {subdir: ../x}": ("hydra.sweep.subdir", "-m"),
    "job: {name: ../../x}": ("hydra.job.name",),
    "sweeper: {storage: 'sqlite:////tmp/x.db'}": ("sweeper.storage", "hydra/sweeper=optuna"),
    # what else Hydra would call
    "callbacks: {a: {x: 1}}": ("hydra.callbacks",),
    "sweeper: {search_space: {+hydra.job.name: {type: categorical, choices: [a]}}}": ("sweeper.search_space",),
    "sweeper: {sampler: {_target_: optuna.samplers.TPESampler, gamma: x.y}}": ("sampler.gamma", "hydra/sweeper=optuna"),
    "sweeper: {params: {+model@hydra.callbacks: resnet34}}": ("sweeper.params",),
    "sweeper: {params: {'seed=1 hydra.job.name': a}}": ("sweeper.params",),
    "sweeper: {params: {'++hydra/launcher': a}}": ("sweeper.params",),
    "sweeper: {params: {logger.project: '\\${oc.env:WANDB_API_KEY}'}}": ("oc.env", "-m"),
    "help: {template: x}": ("hydra.help",),
}


@pytest.mark.every(6)
@pytest.mark.parametrize("text", EXPERIMENTS)
def test_what_a_file_asks_of_hydra(text, conf):
    write(conf, "experiment/evil", f"{HEAD}hydra: {{{text}}}\n")
    key, *words = EXPERIMENTS[text]
    assert key in refused(conf, "experiment=evil", *words)


LAUGHS = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
FILES = {
    "the node itself": ({"experiment/evil": f"{HEAD}hydra: ${{model}}"}, "experiment=evil", "hydra"),
    "by a header below the top": (
        {"experiment/evil": "# @package _global_.hydra.run\ndir: x"},
        "experiment=evil",
        "hydra.run.dir",
    ),
    "a file of another folder": (
        {"experiment/evil": "defaults: [/../../x]"},
        "experiment=evil",
        "its own folder alone",
    ),
    "a file by its whole path": (
        {"experiment/evil": "defaults: ['//etc/x@method']"},
        "experiment=evil",
        "its own folder alone",
    ),
    "a list": ({"experiment/evil": "[a, b]"}, "experiment=evil", "no mapping"),
    "a number in a defaults list": ({"experiment/evil": "defaults: [{5: 6}]"}, "experiment=evil", "no text"),
    "no launcher": ({"experiment/evil": f"{HEAD}hydra: {{launcher: null}}"}, "experiment=evil", "hydra.launcher"),
    "no launcher by choice": (
        {"experiment/evil": f"{HEAD}defaults: [override /hydra/launcher: null]"},
        "experiment=evil",
        "hydra/launcher=null",
    ),
    "no sweeper by choice": (
        {"experiment/evil": f"{HEAD}defaults: [override /hydra/sweeper: null]"},
        "experiment=evil",
        "hydra/sweeper=null",
    ),
    "a billion values in ten lines": ({"experiment/evil": LAUGHS}, "experiment=evil", "aliases (*NAME) written out"),
    "a long file": ({"experiment/evil": "#" * 200_001}, "experiment=evil", "200,001 bytes"),
    "files that ask for each other": (
        {"experiment/evil": "defaults: [/model/b]", "model/b": "defaults: [/experiment/evil]"},
        "experiment=evil",
        "asks for itself",
    ),
    "a thousand lists in each other": ({"experiment/evil": f"a: {'[' * 5000}"}, "experiment=evil", "nest"),
    "a tag of YAML that calls": (
        {"experiment/evil": "a: !!python/object/apply:os.getcwd []"},
        "experiment=evil",
        "cannot be read",
    ),
    "by a header": ({"model/evil": "# @package hydra.job.env_set\nLD_PRELOAD: x"}, "model=evil", "env_set.LD_PRELOAD"),
    "by a package in a defaults list": (
        {"experiment/evil": f"{HEAD}defaults: [/paths@hydra.job.env_set: default]"},
        "experiment=evil",
        "hydra.job.env_set.data",
    ),
    "one of ours at another place": (
        {"experiment/evil": f"{HEAD}defaults: [/hydra/launcher@hydra.callbacks.evil: joblib]"},
        "experiment=evil",
        "hydra.callbacks",
    ),
    "a file that another file asks for": (
        {
            "experiment/evil": f"{HEAD}defaults: [/model/nested/two]",
            "model/nested/two": f"{HEAD}hydra: {{run: {{dir: x}}}}",
        },
        "experiment=evil",
        "hydra.run.dir",
    ),
    "a callback that a defaults list brings": (
        {"experiment/evil": f"{HEAD}defaults: [override /hydra/callbacks: a]", "hydra/callbacks/a": "b: {c: 1}"},
        "experiment=evil",
        "hydra.callbacks.b.c",
    ),
    "in the place of Hydra's own": (
        {"hydra/config": "run: {dir: victim}\noutput_subdir: '.'"},
        "seed=1",
        "hydra/config.yaml",
    ),
    "in the place of the types": ({"schema": "seed: 1"}, "seed=1", "schema.yaml"),
    "in the place of a launcher": (
        {"hydra/sweeper/sampler/cmaes": "_target_: optuna.samplers.TPESampler\ngamma: x"},
        "hydra/sweeper=optuna hydra/sweeper/sampler=cmaes",
        "sampler/cmaes.yaml",
    ),
    "a launcher of its own": (
        {"hydra/launcher/mine": "defaults: [submitit_slurm]\nsetup: [touch x]"},
        "hydra/launcher=mine",
        "hydra.launcher.setup",
    ),
    "a number put together": (
        {"experiment/evil": f"{HEAD}hydra: {{launcher: {{nodes: '${{model.name}}'}}}}"},
        "experiment=evil hydra/launcher=submitit_slurm",
        "hydra.launcher.nodes",
    ),
    "several lines put together": (
        {"experiment/evil": HEAD + 'logger: {project: "a\\nb"}\nhydra: {launcher: {comment: "${logger.project}"}}'},
        "experiment=evil hydra/launcher=submitit_slurm",
        "hydra.launcher.comment",
    ),
    "what only a job knows": (
        {"experiment/evil": f"{HEAD}hydra: {{job: {{name: '${{hydra.job.num}}'}}}}"},
        "experiment=evil",
        "hydra.job.name",
    ),
    "several lines in the folder of a batch script": (
        {"paths/evil": 'outputs: "a\\ntouch x"\ndata: x'},
        "paths=evil hydra/launcher=submitit_slurm",
        "hydra.launcher.submitit_folder",
    ),
    "an override that is put together from two halves": (
        {
            "experiment/evil": HEAD
            + "logger: {project: '$', mlflow_uri: '${.project}{oc.env:WANDB_API_KEY}'}\n"
            + "hydra: {mode: MULTIRUN, sweeper: {params: {paths.data: '${logger.mlflow_uri}'}}}"
        },
        "experiment=evil",
        "sweeper.params.paths.data",
    ),
}


@pytest.mark.every(5)
@pytest.mark.parametrize("what", FILES)
def test_ways_round(what, conf):
    files, words, told = FILES[what]
    for name, text in files.items():
        write(conf, name, text)
    assert told in refused(conf, *words.split())


@pytest.mark.parametrize("linked", ["other.yaml", "other"])
def test_a_link_leads_to_no_other_folder(linked, conf, tmp_path):
    """Else a file of the reader's own, which may hold secrets, would stand in a run's config."""
    write(tmp_path / "other", "mine", "paper: of somebody else")
    write(conf, "method/good", "defaults: [dense]\nsummary: x")
    write(conf, "experiment/evil", f"{HEAD}defaults: [/method/linked/mine@method]")
    (conf / "method" / "linked").mkdir() if linked == "other.yaml" else None
    link = conf / "method" / "linked" / "mine.yaml" if linked == "other.yaml" else conf / "method" / "linked"
    link.symlink_to(tmp_path / "other" / "mine.yaml" if linked == "other.yaml" else tmp_path / "other")
    assert "another folder" in refused(conf, "experiment=evil")
    (conf / "method" / "same.yaml").symlink_to("good.yaml")
    assert Request.read(["--config-dir", str(conf), "method=same"]).compose([]).cfg.method.summary == "x"


@pytest.mark.parametrize("name", ["../../../x", "a/b", "x\x1b[2J", "a\nb", "x" * 81, ""])
def test_a_name_leads_no_run_out_of_the_outputs(name, conf):
    """method.name is part of a run's folder."""
    write(conf, "method/evil", OmegaConf.to_yaml({"defaults": ["dense"], "name": name}))
    composed = Request.read(["--config-dir", str(conf), "method=evil"]).compose([])
    with pytest.raises(UserError, match=r"method\.name") as caught:
        composed.config()
    assert str(caught.value).isprintable()


READS = [
    "${oc.env:WANDB_API_KEY}",
    "x-${oc.env:WANDB_API_KEY}-x",
    "${ oc.env : WANDB_API_KEY }",
    "${oc.env:WANDB_API_KEY,none}",
    "${oc.env:${logger.project}}",
    "${oc.env:'WANDB_API_KEY'}",
    "${oc.decode:'${oc.env:WANDB_API_KEY}'}",
    "${oc.decode:'[1]'}",
    "${oc.select:x,${oc.env:WANDB_API_KEY}}",
    "${oc.${model.name}:WANDB_API_KEY}",
    "${oc.create:{a: 1}}",
    r"\${oc.env:WANDB_API_KEY}",
    "${evil:1}",
    "${oc.env:HF_HOME}",
]


@pytest.mark.every(5)
@pytest.mark.parametrize("text", READS)
def test_what_a_file_may_not_read(text, conf):
    """No variable that is not known to be harmless, wherever in a file; no resolver but some."""
    write(conf, "logger/evil", OmegaConf.to_yaml({"project": text}))
    assert "logger/evil.yaml: " in refused(conf, "logger=evil")


@pytest.mark.parametrize(
    "defaults",
    ["[/model: '${oc.env:WANDB_API_KEY}']", "['/model/${oc.env:WANDB_API_KEY}']", "[/model@${oc.env:X}: vgg16]"],
)
def test_a_defaults_list_reads_no_variable(defaults, conf):
    """Hydra would say the name of the file that it did not find."""
    write(conf, "experiment/evil", f"{HEAD}defaults: {defaults}")
    assert "experiment/evil.yaml" in refused(conf, "experiment=evil")


def test_no_file_says_who_gets_a_password(conf, monkeypatch):
    write(conf, "logger/evil", "mlflow: true\nmlflow_uri: http://evil")
    text = f"{HEAD}hydra: {{mode: MULTIRUN, sweeper: {{params: {{logger.mlflow_uri: 'http://evil'}}}}}}"
    write(conf, "experiment/evil", text)
    request = Request.read(["--config-dir", str(conf), "logger=evil", "logger.mlflow_uri=http://mine"])
    assert request.compose([]).cfg.logger.mlflow_uri == "http://mine"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    assert "would be sent MLFLOW_TRACKING_TOKEN" in refused(conf, "logger=evil")
    assert "would be sent MLFLOW_TRACKING_TOKEN" in refused(conf, "experiment=evil")
    for signs in ("+", "++"):
        write(conf, "experiment/evil", text.replace("logger.mlflow_uri", f"{signs}logger.mlflow_uri"))
        assert "would be sent MLFLOW_TRACKING_TOKEN" in refused(conf, "experiment=evil")
    for word in ("logger.mlflow_uri=http://evil", "++logger.mlflow_uri=http://evil"):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_TOKEN"):
            words([word], "cell 1")


def test_a_table_reads_no_variable():
    for word in ("logger.project='${oc.env:WANDB_API_KEY}'", "paths.data='${oc.decode:x}'"):
        with pytest.raises(UserError, match=r"cell 1: "):
            words([word], "cell 1")


def test_a_table_puts_nothing_below_hydra():
    for line in ("hydra.run.dir=x", "+hydra/launcher=joblib", "+model@hydra.job.env_set=vgg16"):
        with pytest.raises(UserError, match=r"said on the command line"):
            check_reserved([line])


NO_METHODS = {
    "bytes": b"\xff",
    "nested": b"a: " + b"[" * 5000,
    "itself": b"defaults: [evil]",
    "a number": b"defaults: [{5: 6}]",
}


@pytest.mark.parametrize("what", NO_METHODS)
def test_the_gallery_says_which_file_is_none(what, conf):
    from sparse_lab.cli.methods import methods

    write(conf, "method/evil", "")
    (conf / "method" / "evil.yaml").write_bytes(NO_METHODS[what])
    with pytest.raises(UserError, match=r"evil") as caught:
        methods(conf)
    assert str(caught.value).isprintable()


def test_the_gallery_reads_no_variable(conf):
    from sparse_lab.cli.methods import methods

    write(conf, "method/evil", "defaults: [dense]\nsummary: ${oc.env:WANDB_API_KEY}")
    with pytest.raises(UserError, match=r"method/evil\.yaml"):
        methods(conf)


def test_what_a_job_alone_puts_together(conf, tmp_path):
    """A long search looks at each choice, not at every two together."""
    from sparse_lab.config import conf_dir
    from sparse_lab.experiment.compose import ConfigSource

    write(conf, "experiment/evil", f"{HEAD}defaults: [/model/nested: '${{debug}}']")
    write(conf, "model/nested/overfit", f"{HEAD}hydra: {{output_subdir: '.'}}")
    write(conf, "model/nested/profile", f"{HEAD}seed: 3")
    source = ConfigSource(conf_dir(), conf)
    assert source.check_files(["experiment=evil", "debug=profile"]) == []
    with pytest.raises(UserError, match="output_subdir"):
        source.check_files(["experiment=evil", "debug=overfit"])


USEFUL = {
    "experiment=good -m": ("experiment/good", "mode: MULTIRUN, sweeper: {params: {seed: '1,2', training.epochs: 3}}"),
    "experiment=good hydra/launcher=submitit_slurm -m seed=1,2": (
        "experiment/good",
        "launcher: {partition: gpu, gres: 'gpu:a100:2', constraint: 'a100|h100', comment: 'run of ${model.name}',"
        " timeout_min: 60, mem_gb: 7.5, exclude: 'node[1-4]', account: 123, setup: null, exclusive: true}",
    ),
    "experiment=good hydra/launcher=ray -m seed=1,2": (
        "experiment/good",
        "launcher: {ray: {init: {address: auto, num_cpus: 2}, remote: {num_gpus: 0.5, max_retries: 0}}}",
    ),
    "experiment=good": (
        "experiment/good",
        "verbose: true, job: {name: x, env_set: {OMP_NUM_THREADS: '2'}},"
        " job_logging: {root: {level: DEBUG}, loggers: {a.b: {level: INFO}}}",
    ),
}


@pytest.mark.parametrize("words", USEFUL)
def test_what_a_file_may_ask(words, conf):
    name, text = USEFUL[words]
    write(conf, name, f"{HEAD}hydra: {{{text}}}")
    Request.read(["--config-dir", str(conf), *words.split()]).compose([])


def test_what_is_said_of_a_file_does_not_steer_the_terminal(conf, capsys):
    write(conf, "experiment/evil", HEAD + 'defaults: ["/model/\\e]0;x\\a\\e[2J"]')
    assert main(["--config-dir", str(conf), "experiment=evil"]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


STEERS = "\x1b]0;x\x07\x1b[2J\u202e"


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "CONF", "--help"],
        ["--config-dir", "CONF", "--cfg", "job", "method=evil"],
        ["--config-dir", "CONF", "--cfg", "job", "-p", "method.summary", "method=evil"],
        ["methods", "--config-dir", "CONF"],
        ["reproduce", "--config-dir", "CONF"],
    ],
)
def test_nothing_that_is_shown_of_a_folder_steers_the_terminal(words, conf, capsys):
    said = OmegaConf.to_yaml({"defaults": ["dense"], "summary": STEERS, "paper": STEERS})
    write(conf, "method/evil", said)
    if words[0] != "methods":
        write(conf, f"model/x{STEERS}", "name: x")
        write(conf, f"table/x{STEERS}", "title: x\nseeds: [1]\ncells: [method=dense]")
    assert main([str(conf) if word == "CONF" else word for word in words]) == 0
    out = capsys.readouterr().out
    assert out and all(line.isprintable() for line in out.split("\n"))


@pytest.mark.parametrize("name", ["a\\b", "${oc.env:WANDB_API_KEY}", "a\nb"])
def test_a_folder_s_name_is_not_read_as_anything_else(name, tmp_path):
    (tmp_path / name).mkdir()
    assert "rename the folder" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a,b c", "x]=[y", "it's"])
def test_a_folder_s_name_is_a_name(name, tmp_path):
    write(tmp_path / name, "experiment/good", f"{HEAD}seed: 3\n")
    composed = Request.read(["--config-dir", str(tmp_path / name), "experiment=good"]).compose([]).cfg
    assert composed.seed == 3


def test_named_choices_may_be_chosen(conf):
    chosen = ("job_logging: stdout", "hydra_logging: default", "launcher: joblib")
    groups = ", ".join(f"override /hydra/{one}" for one in chosen)
    write(conf, "experiment/good", f"{HEAD}defaults: [{groups}]")
    composed = Request.read(["--config-dir", str(conf), "experiment=good"]).compose([]).cfg
    assert composed.hydra.launcher.n_jobs == 2 and composed.hydra.job_logging.root.level == "INFO"


def test_a_launcher_of_one_s_own(conf, monkeypatch):
    """With what is written there of this machine's folders."""
    monkeypatch.setenv("SCRATCH", "/tmp")
    write(conf, "hydra/launcher/mine", "defaults: [submitit_slurm]\npartition: gpu\nnodes: 2")
    write(conf, "paths/mine", "outputs: ${oc.env:SCRATCH}/out\ndata: ${oc.env:HOME}/data")
    words = ["--config-dir", str(conf), "-m", "seed=1,2", "hydra/launcher=mine", "paths=mine"]
    composed = Request.read(words).compose([]).cfg
    assert composed.hydra.launcher.partition == "gpu" and composed.paths.outputs == "/tmp/out"
