"`fixmatch_demo`: quiet in a log, the same for the same seed, and right about what can't be"

import re
import shutil

import pandas as pd
import pytest
from fastai.vision.all import parent_label

from fixmatch_fastai.cli.comparison import choose_pool, hold_out
from fixmatch_fastai.cli.demo import fixmatch_demo
from fixmatch_fastai.console import CommandError, run_command
from fixmatch_fastai.labeled import digits_path

WRONG = {
    '--labels 45': '45 labels',
    '--data nowhere': '--data nowhere is not a folder',
    '--threshold 95': '--threshold must be between 0 and 1',
    '--unlabeled 100000': 'unlabelled images: use 1 to',
    '--steps 0': '--steps must be 1 or more',
    '--seeds 0': '--seeds must be 1 or more',
    f'--data {digits_path()}/3': 'two classes',
}


@pytest.mark.slow
def test_the_demo_is_quiet_in_a_log(tmp_path, capsys, undrawn):
    assert run_command(fixmatch_demo, ['--labels', 20, '--steps', 4, '--seeds', 1, '--out', tmp_path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [o for o in lines if o.startswith('step ')] == [f'step {i} of 8' for i in range(1, 9)] and len(lines) <= 20
    written = {'results.csv', 'accuracy.png', 'training.png', 'pseudo_labels.png'}
    assert {o.name for o in tmp_path.iterdir()} == written
    results = pd.read_csv(tmp_path / 'results.csv')
    assert results.method.tolist() == ['probe', 'supervised', 'FixMatch'] and results.steps.tolist() == [0, 4, 4]
    assert '20 labels, 1280 more images without, 4 steps, threshold 0.95' in lines


@pytest.mark.slow
def test_the_demo_takes_a_folder_of_ones_own(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for c in '12':
        (tmp_path / 'mine' / c).mkdir(parents=True)
        for o in [o for o in digits if parent_label(o) == c][:32]:
            shutil.copy(o, tmp_path / 'mine' / c)
    args = '--data mine --labels 4 --unlabeled 40 --steps 3 --seeds 2 --size 24 --no-flip'
    assert run_command(fixmatch_demo, args.split()) == 0
    assert '4 labels, 40 more images without, 3 steps' in capsys.readouterr().out
    assert pd.read_csv('demo/results.csv').seed.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize('args', WRONG)
def test_a_mistake_in_the_demo_comes_before_the_training(args, tmp_path, capsys):
    assert run_command(fixmatch_demo, [*args.split(), '--out', tmp_path / 'out']) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith('fixmatch_demo: ') and WRONG[args] in err and '\n' not in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('n_ones, damaged, match', [
    (1, False, "only one image of '1': add another"),
    (2, True, "labelled image .* can't be opened"),
])  # fmt: skip
def test_a_folder_that_the_demo_can_not_use(n_ones, damaged, match, tmp_path, digits, capsys):
    for name, n in {'0': 4, '1': n_ones}.items():
        (tmp_path / 'mine' / name).mkdir(parents=True)
        for o in [o for o in digits if parent_label(o) == name][:n]:
            shutil.copy(o, tmp_path / 'mine' / name)
    if damaged:
        (tmp_path / 'mine' / '0' / 'x.png').write_bytes(b'none')
    args = ['--data', tmp_path / 'mine', '--labels', 2, '--steps', 2, '--out', tmp_path / 'out']
    assert run_command(fixmatch_demo, args) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(match, err) and '\n' not in err


def test_tested_images_are_as_many_of_each_class_and_never_trained_on(digits):
    train, test = hold_out(digits, 400)
    assert len(test) >= 400 and not set(train) & set(test)
    assert pd.Series([parent_label(o) for o in train]).value_counts().nunique() == 1
    with pytest.raises(CommandError, match='two classes'):
        hold_out([o for o in digits if parent_label(o) == '3'])


def test_the_pool_holds_the_labelled_images_too(digits):
    train, _ = hold_out(digits, 400)
    pool = choose_pool(train, 40, 100, seed=1)
    assert len(pool) == len(set(pool)) == 140 and set(pool) <= set(train)
    assert choose_pool(train, 40, 100, seed=1) == pool != choose_pool(train, 40, 100, seed=2)
    assert set(choose_pool(train, 40, None, seed=1)) == set(train)
