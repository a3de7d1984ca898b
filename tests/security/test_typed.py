"""What is typed is trusted, but for what would run, write or keep what nobody meant: flags by name, places, secrets."""

from __future__ import annotations

import itertools
from pathlib import Path

import hydra
import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode

from sparse_lab.cli.main import main
from sparse_lab.config import conf_dir
from sparse_lab.errors import UserError
from sparse_lab.experiment.security.flags import FLAGS, check_flags
from sparse_lab.experiment.security.launching import check_batch
from sparse_lab.sweep.launch import Task
from sparse_lab.sweep.launchers import Job, composed
from sparse_lab.sweep.plan import Request

SLURM = "hydra/launcher=submitit_slurm"
KEY = "a1b2c3d4e5f6"


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        Request.read(list(words)).compose([])
    line = str(caught.value)
    assert line.isprintable() and KEY not in line, line
    return line


@pytest.mark.parametrize("how", ["--experimental-rerun={}", "--experimental-rerun {}", "--exp={}", "--e {}"])
def test_no_flag_unpickles_a_file(how, tmp_path, traps, capsys):
    traps.write(tmp_path / "config.pickle", "pickle")
    assert main(how.format(tmp_path / "config.pickle").split()) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and how.split("{")[0].strip(" =") in said
    assert not traps.sprung


@pytest.mark.parametrize(
    "word", ["--multi", "--conf=x", "--config", "-mr", "-s", "-cdx", "--", "-", "-1", "--seed=3", "--Multirun", "-M"]
)
def test_flags_are_taken_by_their_whole_names(word):
    with pytest.raises(UserError, match="unknown flag"):
        check_flags(["seed=1", word])


def test_every_flag_is_one_of_hydra_s():
    """And all of Hydra's are taken, or refused with a reason."""
    from hydra._internal.utils import get_args_parser

    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert set(FLAGS) <= known
    refused_ones = known - set(FLAGS)
    assert refused_ones == {"--experimental-rerun", "--config-name", "-cn", "--config-path", "-cp"}
    for name in refused_ones:
        with pytest.raises(UserError, match=name.replace("-cn", "-name").replace("-cp", "-path")):
            check_flags([name])
    check_flags([*FLAGS, "--config-dir=x", "-c=job", "a=-1", "seed=1,2"])


def test_what_answers_is_looked_at_too(tmp_path):
    """Hydra sets its logging up for --hydra-help and --info."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra: {hydra_logging: {handlers: {x: {(): os.getcwd}}}}"
    (tmp_path / "experiment" / "evil.yaml").write_text(text)
    for flag in ("--hydra-help", "--info=config"):
        with pytest.raises(UserError, match="hydra_logging"):
            Request.read([flag, "--config-dir", str(tmp_path), "experiment=evil"])


PLACES = {
    "hydra.run.dir=/tmp/elsewhere": "hydra.run.dir",
    "hydra.run.dir=${paths.outputs}/../x": "hydra.run.dir",
    "hydra.sweep.dir=..": "hydra.sweep.dir",
    "hydra.sweep.subdir=../x": "hydra.sweep.subdir",
    "hydra.sweep.subdir=/tmp/x": "hydra.sweep.subdir",
    "hydra.output_subdir=.": "hydra.output_subdir",
    "hydra.output_subdir=../x": "hydra.output_subdir",
    "hydra.job.name=../x": "hydra.job.name",
    f"{SLURM} hydra.launcher.submitit_folder=/tmp/x": "hydra.launcher.submitit_folder",
    "hydra.run.dir=${paths.outputs}/out": "hydra.run.dir",  # a link
}


@pytest.mark.every(3)
@pytest.mark.parametrize("words", PLACES)
def test_hydra_writes_below_outputs_alone(words, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "out").symlink_to(tmp_path)
    assert PLACES[words] in refused(f"paths.outputs={tmp_path}/outputs", *words.split())


def test_places_that_are_taken(tmp_path):
    words = ["hydra.run.dir=${paths.outputs}/a/${now:%Y}", "hydra.output_subdir=.hydra", "hydra.job.name=rank_1"]
    Request.read([f"paths.outputs={tmp_path}", *words]).compose([])


def test_what_only_a_job_knows_is_looked_at_when_it_starts(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for subdir, told in (
        ("${hydra.job.num}/../../x", "hydra.sweep.subdir"),
        ("${hydra.job.num}-${oc.env:WANDB_API_KEY}", "WANDB_API_KEY"),
    ):
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            own = GlobalHydra.instance().hydra
            words = ["hydra.sweep.subdir='" + subdir + "'"]
            config = own.compose_config("config", words, RunMode.MULTIRUN, with_log_configuration=False)
            HydraConfig.instance().set_config(config)
            context = HydraContext(config_loader=own.config_loader, callbacks=Callbacks())
            with pytest.raises(UserError, match=told):
                composed(context, config, Task("", "basic", 1), Job(0, "x", ("seed=1",)))


SECRETS = [
    f"{SLURM} hydra.launcher.comment=${{oc.env:WANDB_API_KEY}}",
    f"{SLURM} hydra.launcher.name=${{oc.env:WANDB_API_KEY}}",
    "hydra/launcher=ray +hydra.launcher.ray.remote.runtime_env.env_vars.X=${oc.env:WANDB_API_KEY}",
    "hydra.run.dir=${paths.outputs}/${oc.env:WANDB_API_KEY}",
    "hydra.sweep.subdir=${hydra.job.num}${oc.env:WANDB_API_KEY}",
    "hydra.job.name=${oc.env:WANDB_API_KEY}",
    "+hydra.job.env_set.X=${oc.env:WANDB_API_KEY}",
    "hydra.help.template=${oc.env:WANDB_API_KEY}",
    "hydra/launcher=submitit_slurm hydra.launcher.name=${logger.project} logger.project=${oc.env:WANDB_API_KEY}",
]


@pytest.mark.every(3)
@pytest.mark.parametrize("words", SECRETS)
def test_no_secret_reaches_what_hydra_keeps(words, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert "WANDB_API_KEY" in refused(*words.split())


SHELL = [
    f"{SLURM}|hydra.launcher.setup=['${{paths.data}}']",
    f"{SLURM}|+hydra.launcher.teardown=['x ${{paths.data}}']",
    f"{SLURM}|+hydra.launcher.srun_args=['${{paths.data}}']",
    f"{SLURM}|hydra.launcher.setup=${{training.milestones}}",
    f"{SLURM}|hydra.launcher.setup=['#SBATCH --uid=0']",
    f"{SLURM}|hydra.launcher.additional_parameters={{a: '${{model.name}}'}}",
    f"{SLURM}|hydra.launcher.partition=${{model.name}};x|model.name=vgg16",
    f"{SLURM}|hydra.launcher.comment='$(x)'",
    "hydra/launcher=ray|+hydra.launcher.ray.init.runtime_env={pip: ['${model.name}']}",
    "+hydra.job.env_set.LD_PRELOAD=${model.name}",
]


@pytest.mark.every(3)
@pytest.mark.parametrize("words", SHELL)
def test_no_file_has_a_part_in_what_a_shell_runs(words):
    assert "hydra." in refused(*words.split("|"))


@pytest.mark.parametrize(
    "text", ["a\ntouch x", "a\r#", "a\u2028b", "a\x00b", "`x`", "$(x)", "a;b", "a'b", "a>b", "#SBATCH"]
)
def test_no_value_ends_its_line_of_a_batch_script(text):
    for settings in ({"comment": text}, {"additional_parameters": {text: 1}}, {"mail_user": [text]}):
        with pytest.raises(UserError, match=r"hydra\.launcher\."):
            check_batch(settings)


def test_what_submitit_makes_of_what_is_let_through():
    """Every sign of ASCII but for those that are refused: one line a value, as it is for those that are plain."""
    slurm = pytest.importorskip("submitit.slurm.slurm")
    let_through = []
    for sign, key in itertools.product(map(chr, range(128)), ("partition", "comment", "submitit_folder")):
        try:
            check_batch({key: f"a{sign}b"})
            let_through.append((key, f"a{sign}b"))
        except UserError:
            pass
    plain = len(slurm._make_sbatch_string("c", "f", partition="a", comment="b").splitlines())
    assert len(let_through) > 200
    for key, value in let_through:
        given = {"partition": "a", "comment": "b", "folder": "f"} | {key.replace("submitit_", ""): value}
        lines = slurm._make_sbatch_string("c", **given).splitlines()
        assert len(lines) == plain and all(
            line.startswith("#SBATCH --") for line in lines[3 : lines.index("# command") - 1]
        )


def test_what_is_shown_holds_no_secret(capsys, monkeypatch):
    """A last look: the console is kept in many places."""
    monkeypatch.setattr(Request, "config_text", lambda self: f"x: {KEY}\n")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["--cfg", "job"]) == 0
    assert KEY not in capsys.readouterr().out


def test_a_folder_is_given_by_its_flag_alone(tmp_path: Path):
    for words in ([f"hydra.searchpath=[file://{tmp_path}]"], [f"+hydra.searchpath=['file://{tmp_path}']"]):
        assert "--config-dir" in refused(*words)


@pytest.mark.parametrize("trials", ["null", "0", "-1"])
def test_a_search_makes_a_number_of_trials(trials):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with pytest.raises(UserError, match="n_trials"):
        request = Request.read(["-m", "hydra/sweeper=optuna", "seed=1,2", f"hydra.sweeper.n_trials={trials}"])
        request.read_experiment_axes()
