"What a configuration says: values, files, the command line, and what follows from what"

import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch

from fixmatch_fastai.console import CommandError
from fixmatch_fastai.experiment import config as config_room
from fixmatch_fastai.experiment.config import (
    EMAConfig,
    ExperimentConfig,
    config_yaml,
    flat_values,
    help_table,
    read_config,
    resolved,
)

pytest.importorskip('omegaconf', reason='omegaconf is not installed')


def mistake(*settings, file=None):
    "The sentence that refuses them"
    with pytest.raises(CommandError) as e:
        resolved(read_config(settings, file))
    assert '\n' not in str(e.value)
    return str(e.value)


def test_import_of_the_configuration_is_light():
    heavy = ['torch', 'fastai', 'pandas', 'matplotlib', 'timm']
    code = f"""import sys, fixmatch_fastai.experiment.config as c
c.help_table()
print([o for o in {heavy} if o in sys.modules])"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert res.stdout.strip() == '[]', res.stderr


def test_every_value_has_a_default_and_a_help():
    text = help_table(120)
    values = flat_values(ExperimentConfig())
    assert set(values) > {'data', 'optimizer.wd', 'schedule.part', 'ema.decay', 'views.strong', 'track'}
    for name in values:
        meaning = re.search(rf'^{re.escape(name)} .{{11,}}?  (\S.*)', text, re.M)
        assert meaning and len(meaning[1]) > 8, f'{name} has no help'
    lr = re.search(r'^optimizer.lr +(\S+) +(.*)', text, re.M)
    assert lr[1] == '0.03' and lr[2].startswith('learning rate')
    assert max(map(len, text.splitlines())) <= 120


MISTAKES = {
    'n_label=40': 'n_label is not known: did you mean n_labels',
    'optimiser.lr=1': 'did you mean optimizer.lr',
    'lr=1': 'did you mean optimizer.lr',
    'zzz=1': '`fixmatch_experiment --help` lists all there is',
    'optimizer=sgd': 'optimizer is a group of values: set one of optimizer.name, optimizer.lr',
    'bs=many': "bs can't have this value: Value 'many'",
    'bs=2.5': "bs can't have this value",
    'bs=[1': "bs can't have this value",
    'bs=${nothing}': "bs can't have this value",
    'policy_args=3': "policy_args can't have this value",
    'n_labels': 'write name=value',
    '=3': 'write name=value',
    'policy=flexmach': 'did you mean flexmatch',
    'policy=entropy policy_args.at_mots=1': 'policy_args.at_mots is no argument of entropy: did you mean at_most',
    'policy=supervised policy_args.threshold=1': 'it takes none',
    'policy_args.threshold=9': 'policy_args: `threshold` must be between 0 and 1',
    'forward=joined': 'did you mean joint',
    'optimizer.name=sgd': 'optimizer.name sgd is not known: use for example nesterov, adam',
    'schedule.part=1': 'schedule.part must be above 0 and below 1, but is 1.0',
    'mu=0': 'mu must be 1 or more, but is 0',
    'seed=-1': 'seed must be 0 or more',
    'steps=100 eval_every=30': 'use 90 steps',
    'steps=10007': "can't be divided evenly",
    'track=mlflow,wandbb': 'track wandbb is not known: did you mean wandb',
    'track=none,mlflow': 'track is none, or some of',
    'device=gpu': 'device gpu is not there: use cpu',
    'optimizer.lr=inf': 'optimizer.lr must be a finite number, but is inf',
    'lambda_u=.nan': 'lambda_u must be a finite number',
    'optimizer.lr=true': "optimizer.lr can't have this value: Value 'True'",
    'seed=10000000000000000000': 'seed must be 0 or more and below 2**63',
    'bs=???': "bs can't have this value: `${...}` is not replaced here, nor is `???`",
    'name=${oc.env:HOME}': "name can't have this value: `${...}` is not replaced",
    'policy_args.a.b=${oc.env:HOME}': "policy_args.a.b can't have this value: `${...}` is not replaced",
    'name=../../x': "name must be that of one folder in `out`, but is '../../x'",
    'name=..': 'name must be that of one folder',
    'name=/x': 'name must be that of one folder',
    'policy_args.threshold=.inf': 'policy_args.threshold must be a finite number',
    'policy_args.threshold=true': 'policy_args.threshold must be a finite number, but is True',
    "policy_args.threshold='0.9'": "policy_args.threshold must be a finite number, but is '0.9'",
    'policy=mutual_info policy_args.n_passes=2.5': 'policy_args.n_passes must be a whole number',
    'policy=debiasmatch policy_args.margin=1': 'policy_args.margin must be true or false',
}


@pytest.mark.parametrize('settings, sentence', MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes_in_settings(settings, sentence):
    assert sentence in mistake(*settings.split())


def test_precision_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'precision=bf16 needs a GPU' in mistake('precision=bf16')


@pytest.mark.parametrize('name', ['wandb', 'mlflow', 'tensorboard'])
def test_a_tracker_that_is_not_installed(monkeypatch, name):
    monkeypatch.setattr(config_room.importlib.util, 'find_spec', lambda o, *args: None)
    advice = f'which is not installed: `pip install {name}`, or leave it out.'
    assert mistake(f'track={name}') == f'track={name} needs the package {name}, {advice}'


def test_file_and_settings(tmp_path):
    "What comes later replaces what came before; what is written is read again"
    file = tmp_path / 'my.yaml'
    file.write_text('data: digits\nbs: 8\noptimizer:\n  wd: 0.001\n  lr: 0.1\npolicy_args:\n  threshold: 0.8\n')
    c = read_config(['optimizer.lr=0.2', 'steps=40', 'policy_args.T=0.5'], file)
    assert (c.data, c.bs, c.optimizer.wd, c.optimizer.lr, c.steps, c.mu) == ('digits', 8, 0.001, 0.2, 40, 7)
    assert c.policy_args == {'threshold': 0.8, 'T': 0.5}
    for o in (c, resolved(c)):
        file.write_text(config_yaml(o))
        assert read_config(file=file) == o


WRONG = {
    int: (True, 2.5, '3', math.nan),
    float: (True, '0.5', math.inf, -math.inf, math.nan),
    bool: (1, 'yes'),
    str: (3,),
}


@pytest.mark.parametrize('name', flat_values(ExperimentConfig()))
def test_values_of_another_kind_are_refused_in_python(name):
    "Where OmegaConf does not look; a value that may be left out too"
    group, _, key = f'.{name}'.rpartition('.')
    for kind, values in WRONG.items():
        config = ExperimentConfig()
        owner = getattr(config, group[1:]) if group else config
        annotated = str(type(owner).__annotations__[key])
        if kind.__name__ not in annotated.replace('dict[str', ''):
            continue
        for v in values:
            setattr(owner, key, v)
            with pytest.raises(CommandError, match=rf'^{re.escape(name)} must be '):
                resolved(config)


def test_groups_and_texts_in_python():
    for bad in (dict(optimizer={'lr': 0.1}), dict(policy_args=None), dict(name='${oc.env:HOME}'), dict(data='a\0')):
        with pytest.raises(CommandError, match='|'.join(bad)):
            resolved(ExperimentConfig(**bad))


def test_a_secret_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv('SECRET', 'hunter2')
    (tmp_path / 'a.yaml').write_text('name: ok\npolicy_args:\n  note: ["${oc.env:SECRET}"]\n')
    sentence = mistake(file=tmp_path / 'a.yaml')
    assert 'policy_args.note.0' in sentence and 'hunter2' not in sentence
    assert 'hunter2' not in config_yaml(ExperimentConfig(name='${oc.env:SECRET}'))


def test_mistakes_in_a_file(tmp_path):
    def refused(text):
        (tmp_path / 'a.yaml').write_text(text)
        return mistake(file=tmp_path / 'a.yaml')

    assert re.search(r'--config .*a\.yaml: bss is not known: did you mean bs', refused('bss: 3\n'))
    assert 'did you mean optimizer.lr' in refused('optimiser:\n  lr: 3\n')
    assert 'did you mean optimizer.lr' in refused('optimizer:\n  rl: 3\n  lr_: 3\n')
    assert 'must hold names and values' in refused('- 3\n')
    assert "can't be read as YAML" in refused('a: [\n')
    assert '--config nothing.yaml is not there' in mistake(file='nothing.yaml')


def test_what_follows_the_length_of_a_run():
    c = resolved(ExperimentConfig())
    assert (c.ema.decay, c.eval_every, c.log_every, c.name) == (0.999, 1024, 11, 'cifar10_250_fixed')
    assert c.bn_momentum == 0.001
    assert resolved(ExperimentConfig(steps=34658, eval_every=34658)).ema.decay == 0.999
    c = resolved(ExperimentConfig(steps=1000, ema=EMAConfig(0.5)))
    assert (c.ema.decay, c.bn_momentum, c.eval_every, c.log_every) == (0.5, 0.5, 100, 1)
    assert resolved(ExperimentConfig(steps=1000)).ema.decay ** 20 == pytest.approx(0.5), '2 % of the steps'


def test_what_follows_data_and_policy():
    def each(f, **choices):
        ((name, values),) = choices.items()
        return [f(resolved(ExperimentConfig(**{name: o}))) for o in values]

    assert each(lambda c: c.optimizer.wd, data=['cifar10', 'cifar100']) == [5e-4, 1e-3]
    assert each(lambda c: c.views.flip, data=['cifar10', 'stl10', 'svhn', 'digits']) == [True, True, False, False]
    assert each(lambda c: c.dropout, policy=['mutual_info', 'entropy']) == [0.3, 0]
    given = ExperimentConfig(data='some/where/birds')
    assert resolved(given).name == 'birds_250_fixed' and given == ExperimentConfig(data='some/where/birds')
    assert None not in [v for k, v in flat_values(resolved(given)).items() if k not in ('size', 'root')]
    assert dataclasses.asdict(resolved(resolved(given))) == dataclasses.asdict(resolved(given))
