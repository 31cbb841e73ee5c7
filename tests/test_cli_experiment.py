"The command `fixmatch_experiment`: its arguments, what it prints, and its exit codes"

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastai.vision.all import Callback

from fixmatch_fastai.cli.experiment import main
from fixmatch_fastai.experiment import run as run_room
from fixmatch_fastai.experiment.config import ExperimentConfig, flat_values, read_config, resolved

pytest.importorskip('omegaconf', reason='omegaconf is not installed')
SMALL = 'data=images/digits n_labels=20 network=small_cnn bs=4 mu=2 steps=6 eval_every=2 workers=0'.split()


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *args):
    "What the command says when it refuses its arguments"
    assert main([*args]) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith('fixmatch_experiment: ') and '\n' not in sentence
    return sentence.removeprefix('fixmatch_experiment: ')


def test_help_of_the_experiment_is_light_and_whole():
    code = """import sys
from fixmatch_fastai.cli.experiment import main
main(['--help'])
print([o for o in ('torch', 'fastai', 'pandas', 'matplotlib') if o in sys.modules])"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert res.stdout.splitlines()[-1] == '[]', res.stderr
    assert res.stdout.startswith('usage: fixmatch_experiment [--config FILE] [--print] [name=value ...]')
    for name in flat_values(ExperimentConfig()):
        assert re.search(rf'^{re.escape(name)} ', res.stdout, re.M), f'{name} is not in --help'


def test_mistakes_of_the_experiment_are_one_sentence(capsys):
    "One of each room; the others are in the tests of these"
    assert refused(capsys, 'n_label=40') == 'n_label is not known: did you mean n_labels?'
    assert refused(capsys, 'mu=0') == 'mu must be 1 or more, but is 0.'
    assert 'did you mean cifar10' in refused(capsys, 'data=cifar_10')
    assert 'network resnet81 is not known: did you mean resnet' in refused(capsys, 'data=digits', 'network=resnet81')
    assert 'n_labels: 25 labels' in refused(capsys, 'data=digits', 'n_labels=25')
    assert '--config nothing.yaml is not there' in refused(capsys, '--config', 'nothing.yaml')


def test_print_the_configuration(tmp_path, capsys):
    (tmp_path / 'my.yaml').write_text('data: digits\nbs: 8\noptimizer:\n  lr: 0.1\n')
    args = ['optimizer.lr=0.2', 'steps=40']
    assert main(['--config', 'my.yaml', *args, '--print']) == 0
    (tmp_path / 'again.yaml').write_text(capsys.readouterr().out)
    assert read_config(file='again.yaml') == resolved(read_config(args, 'my.yaml'))
    assert not (tmp_path / 'experiments').exists(), 'nothing is trained'


class Interrupt(Callback):
    def after_batch(self):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_experiment_is_stopped_finished_and_read(monkeypatch, capsys, few_digits, undrawn):
    Path('images').symlink_to(few_digits.parent)
    real = run_room.get_learner
    with monkeypatch.context() as m:
        m.setattr(run_room, 'get_learner', lambda *args: real(*args).add_cb(Interrupt()))
        assert main(SMALL) == 130
    assert 'the same command goes on from the last one' in capsys.readouterr().err
    assert main([*SMALL, 'seeds=2']) == 0
    text = capsys.readouterr().out
    assert re.search(r'^seed 1: \d+\.\d\d % of 40 test images right \(raw weights \d+\.\d\d %\)$', text, re.M)
    assert re.search(r'averaged weights, last step: \d+\.\d\d ± \d+\.\d\d %', text) and '2 seeds, 40 test' in text
    folder = Path('experiments/digits_20_fixed')
    assert f'Written to {folder}: results.csv' in text and (folder / 'results.csv').exists()
    assert main([*SMALL, 'seeds=2']) == 0
    assert 'seed 1: finished before' in capsys.readouterr().out
    assert 'holds a run with another bs (4 there, 8 here)' in refused(capsys, *SMALL, 'bs=8')


def test_console_command_of_the_experiment():
    "In a process of its own, as the console calls it"
    code = 'import sys; from fixmatch_fastai.cli.experiment import main; sys.exit(main())'
    command = [sys.executable, '-c', code, 'data=digits', 'n_label=3']
    res = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert res.returncode == 2
    assert res.stderr == 'fixmatch_experiment: n_label is not known: did you mean n_labels?\n'
