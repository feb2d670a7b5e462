"""The command line: what is accepted, what every mistake says, what runs, and that it answers at once."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import tiny

from kd_accel import __version__, cli, verbs
from kd_accel.config import TrainConfig
from kd_accel.config_files import load
from kd_accel.demo_config import DemoConfig
from kd_accel.eval_config import EvalConfig
from kd_accel.index_config import IndexConfig
from kd_accel.predict_config import PredictConfig
from kd_accel.prepare_config import PrepareConfig
from kd_accel.report_config import ReportConfig
from kd_accel.schema import ConfigError


@pytest.fixture
def train_yaml(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(tiny.TRAIN_YAML)
    return str(path)


def test_files_keys_and_verb_come_in_any_order(train_yaml, tmp_path):
    """Later files win over earlier ones, keys over all files, wherever they stand."""
    longer = tmp_path / "longer.yml"
    longer.write_text("optim: {epochs: 9}\nname: longer")
    verb, config = cli.parse(["train", "optim.lr=1e-3", train_yaml, str(longer), "name=mine"])
    assert verb == "train"
    assert config == load(TrainConfig, [train_yaml], ["optim.epochs=9", "optim.lr=1e-3", "name=mine"])


def test_a_value_may_name_a_yaml_file_or_hold_an_equals_sign(train_yaml):
    """What stands before the first '=' is the key, the rest the value, also when it ends with .yaml."""
    config = cli.parse(["train", train_yaml, "data.shards=a=b.yaml"])[1]
    assert config.data.shards == "a=b.yaml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("eval runs/a data=d", EvalConfig(model="runs/a", data="d")),
        ("eval data=d model=runs/a", EvalConfig(model="runs/a", data="d")),
        ("index data/a data/b", IndexConfig(shards=["data/a", "data/b"])),
        ("report runs/a runs/b output=r.html", ReportConfig(runs=["runs/a", "runs/b"], output="r.html")),
        ("demo", DemoConfig()),
        ("demo elsewhere seeds=[1,2]", DemoConfig(output_dir="elsewhere", seeds=[1, 2])),
        ("eval prepare a out=b task=retrieval", PrepareConfig(source="a", out="b", task="retrieval")),
        ("predict a b.jpg c/ - text=[d]", PredictConfig(model="a", images=["b.jpg", "c/", "-"], text=["d"])),
        ("help train", cli.HelpConfig(verb="train")),
        ("train --help", cli.HelpConfig(verb="train")),
        ("help eval prepare", cli.HelpConfig(verb="eval prepare")),
        ("train -h name=3", cli.HelpConfig(verb="train")),
        ("--help", cli.HelpConfig()),
        ("-h", cli.HelpConfig()),
        ("", cli.HelpConfig()),
    ],
)
def test_positional_words_go_to_the_verbs_field(words, expected):
    assert cli.parse(words.split())[1] == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trian a.yaml", "unknown verb 'trian'; did you mean 'train'?"),
        (
            "zzzzzz",
            "unknown verb 'zzzzzz'; one of "
            "train, embed, eval, eval prepare, pack, index, filter, download, export, push, predict,"
            " report, plan, bench, demo, config, doctor, help",
        ),
        ("help evla", "unknown verb 'evla'; did you mean 'eval'?"),
        ("train --lr 3", "'--lr': no flags; write key=value (kd-accel help train lists the keys)"),
        ("train -x=3", "'-x=3': no flags; write key=value (kd-accel help train lists the keys)"),
        (
            "train configs/demo",
            "'configs/demo' is neither a .yaml file nor key=value;"
            " usage: kd-accel train [CONFIG.yaml ...] [key=value ...]",
        ),
        (
            "eval a b data=d",
            "expected one MODEL, got 2: a b; usage: kd-accel eval MODEL [CONFIG.yaml ...] [key=value ...]",
        ),
        ("eval", "MODEL is missing; usage: kd-accel eval MODEL [CONFIG.yaml ...] [key=value ...]"),
        ("report", "RUNS is missing; usage: kd-accel report RUNS [RUNS ...] [CONFIG.yaml ...] [key=value ...]"),
        (
            "demo a b",
            "expected one OUTPUT_DIR, got 2: a b; usage: kd-accel demo [OUTPUT_DIR] [CONFIG.yaml ...] [key=value ...]",
        ),
        ("eval data=d", "model: this key is needed"),
        (
            "predict a",
            "IMAGES is missing; usage: kd-accel predict MODEL IMAGES [IMAGES ...] [CONFIG.yaml ...] [key=value ...]",
        ),
        ("train nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line_on_stderr(words, expected, capsys):
    """Exit code 2, nothing on stdout, no traceback."""
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {expected}\n"
    assert out == ""


def test_every_problem_has_its_line(train_yaml, capsys):
    assert cli.main(["train", train_yaml, "optim.lr=-1", "precision=fp8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: precision: should be 'bf16' or 'fp32' (got \"fp8\")",
        "error: optim.lr: should be greater than 0 (got -1)",
    ]


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_many_ranks_the_main_one_speaks(rank, lines, monkeypatch, capsys):
    """All of them end with the same code."""
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["trian"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


def _verb(monkeypatch, tmp_path, body: str) -> None:
    """Point the verb index at a real module whose `run` has this body."""
    (tmp_path / "target_module.py").write_text(
        f"from kd_accel.schema import ConfigError\ndef run(config):\n    {body}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "target_module", raising=False)
    monkeypatch.setitem(
        verbs.VERBS, "index", ("kd_accel.index_config:IndexConfig", "target_module:run", "for this test")
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return None", 0),
        ("return 3", 3),
        ("assert config.shards == ['a']", 0),
        ("raise ConfigError('mistake')", 2),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_exit_codes(body, code, monkeypatch, tmp_path):
    """None is success, a number is the code, a mistake 2, Ctrl-C 130."""
    _verb(monkeypatch, tmp_path, body)
    assert cli.main(["index", "a"]) == code


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    _verb(monkeypatch, tmp_path, "raise ZeroDivisionError('ours')")
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["index", "a"])


def test_config_prints_what_train_accepts(train_yaml, tmp_path, capsys):
    """The printed YAML alone gives the same config."""
    assert cli.main(["config", train_yaml, "optim.epochs=7"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load(TrainConfig, [printed]) == load(TrainConfig, [train_yaml], ["optim.epochs=7"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kd-accel {__version__}\n"


def test_the_overview_names_every_verb(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    listed = dict(re.split(r" {2,}", line.strip()) for line in out.splitlines() if line.startswith("  "))
    assert listed == {verb: line for verb, (_, _, line) in verbs.VERBS.items()}


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_help_explains_every_key(verb, capsys):
    """With its description, in 100 columns."""
    assert cli.main(["help", verb]) == 0
    out = capsys.readouterr().out
    assert out.startswith(cli.usage(verb))
    assert max(map(len, out.splitlines())) <= 100
    text = " ".join(out.split())
    for name, field in verbs.config_class(verb).model_fields.items():
        assert f"  {name}" in out
        assert " ".join((field.description or "").split()) in text


@pytest.mark.parametrize(
    "line",
    [
        '  precision: bf16 | fp32 (default: "bf16")',
        "  optim.lr: number, > 0 (needed)",
        "  optim.epochs: whole number or null, > 0 (default: null)",
        "  data.shards: text or list of text or null (default: null)",
        "  data.augment.scale: [number, number] (default: [0.9, 1.0])",
        "  student.arch: text or mapping (needed)",
        "  teacher.path: text or null (default: null)",
        "kind: logit_kl, as in objective.terms.NAME",
        "kind: step_below, as in optim.temperature_lr",
        "  teacher_temperature: number or null, > 0 (default: null)",
    ],
)
def test_help_shows_type_limit_and_default(line, capsys):
    """Of keys in sections, of the kinds of a term, and of the schedules inside them."""
    cli.main(["help", "train"])
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("target", [target for verb in verbs.VERBS.values() for target in verb[:2]])
def test_targets_exist(target):
    module, function = target.split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("words", [["--help"], ["help", "train"], ["config"]])
def test_help_and_config_load_nothing_heavy(words, train_yaml):
    """They answer at once, since each of these packages alone takes longer to import than all the rest."""
    words = [*words, train_yaml] if words == ["config"] else words
    heavy = {"torch", "numpy", "transformers", "open_clip", "accelerate", "deepspeed", "datasets", "sklearn"}
    code = (
        f"import sys; from kd_accel.cli import main; assert main({words!r}) == 0; assert not {heavy} & {{*sys.modules}}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_m_kd_accel_is_the_command():
    """With the exit code, without a traceback."""
    done = subprocess.run([sys.executable, "-m", "kd_accel", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown verb 'trian'; did you mean 'train'?\n")


ENDING = """
import atexit
from kd_accel import cli

class Kept:
    def __del__(self):
        print("taken apart")

def main():
    atexit.register(print, "closed")
    {body}

kept, cli.main = Kept(), main
cli.run()
"""


@pytest.mark.parametrize(
    ("body", "code", "last"), [("return 3", 3, ""), ("1 / 0", 1, "ZeroDivisionError: division by zero")]
)
def test_the_end_waits_for_who_asked_for_it_and_takes_nothing_apart(body, code, last):
    program = [sys.executable, "-c", ENDING.format(body=body)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "closed\n")
    assert done.stderr.splitlines()[-1:] == [last][: bool(last)]


def test_parse_runs_nothing():
    """It raises what main prints."""
    with pytest.raises(ConfigError, match="unknown verb"):
        cli.parse(["trian"])


def test_a_reader_that_has_had_enough_is_no_error():
    """As with `kd-accel config ... | head -1`."""
    program = [sys.executable, "-u", "-m", "kd_accel", "help", "train"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
