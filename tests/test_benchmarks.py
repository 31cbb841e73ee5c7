"The benchmark commands run, go on after an interrupt, and write the tables that the docs quote"

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_net
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))
import cifar10  # noqa: E402
import policies  # noqa: E402
import speed  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_policies_benchmark(tmp_path, monkeypatch, capsys):
    args = '--labels 10 --seeds 2 --steps 3 --mu 2 --workers 0 --only supervised'.split()
    args += ['mutual information', '--out', str(tmp_path)]
    policies.main(args)
    rows = list(csv.DictReader((tmp_path / 'policies.csv').open()))
    assert [(r['method'], r['seed']) for r in rows] == [
        ('supervised', '0'),
        ('mutual information', '0'),
        ('supervised', '1'),
        ('mutual information', '1'),
    ]
    assert all(0 <= float(r['accuracy']) <= 1 and r['n_test'] == '497' for r in rows)
    text = (tmp_path / 'policies.md').read_text()
    assert '## digits, 10 labels' in text and '3 steps of 16 labelled and 32 unlabelled images, 2 seeds' in text
    first, second = (100 * float(r['accuracy']) for r in rows[::2])
    assert f'| supervised | {(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f} | – |' in text

    monkeypatch.setattr(policies, 'run', lambda *args: pytest.fail('what has been measured is not measured again'))
    policies.main(args)
    with pytest.raises(SystemExit):
        policies.main(['--only', 'MixMatch'])
    assert "there is no method ['MixMatch']" in capsys.readouterr().err


def test_every_policy_trains_in_the_benchmark(tmp_path, digits):
    comparison = policies.FewLabels(digits[::6], 10, steps=2, mu=1, num_workers=0, n_test=100, flip=False)
    for method, policy in policies.policies(2).items():
        row = policies.run(comparison, 'digits', method, policy, 0)
        assert list(row) and set(row) == set(policies.COLUMNS), method


def test_the_committed_table_of_policies_is_made_of_the_committed_runs():
    rows = policies.in_order(pd.read_csv(ROOT / 'benchmarks/policies.csv'))
    assert policies.table(rows) == (ROOT / 'benchmarks/policies.md').read_text()


def small_net():
    torch.manual_seed(0)
    return tiny_net(norm=None, n_in=3)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(speed, 'NETS', {'small': small_net, 'ResNet-18': small_net})
    monkeypatch.setattr(speed, 'wide_resnet', small_net)


def test_bare_loop_takes_the_same_steps(small, monkeypatch):
    "What FixMatch is measured against does the same work: equal weights after as many steps"
    data = speed.batch(4, 7, 'cpu')
    bare = speed.Bare(small_net(), data, 'cpu', False)
    for _ in range(4):
        speed.bare(bare.net, bare.opt, data, False)
    for forward in speed.FORWARDS:
        ours = speed.Ours(small_net(), data, 'cpu', False, forward)
        ours()
        for p, q in zip(bare.net.parameters(), ours.learn.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_speed_benchmark(small, tmp_path):
    speed.main(['--out', str(tmp_path), '--only', 'steps', 'mu', '--rounds', '1'])
    text = (tmp_path / 'results.md').read_text(encoding='utf-8')
    assert '### The step' in text and '| small |' in text and '### Growth with mu' in text and '### Views' not in text
    assert 'Not measured yet: `make bench ARGS="--device cuda"`' in text
    speed.main(['--out', str(tmp_path), '--only', 'steps', '--rounds', '1'])
    assert '### Growth with mu' in (tmp_path / 'results.md').read_text(encoding='utf-8'), (
        'one table is measured anew, the others stay'
    )


def test_large_photos_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'LARGE', (1800, 1200))
    speed.main(['--out', str(tmp_path), '--only', 'large', '--rounds', '1'])
    text = (tmp_path / 'results.md').read_text(encoding='utf-8')
    found = re.findall(r'\| quality .*? MB \| .*? s \| .*? s \| .*? \| (.*?), .*? \| (.*?), .*? \| (.*?), ', text)
    assert len(found) == 4 and all(
        0 < float(late) < float(bicubic) < float(lanczos) for late, bicubic, lanczos in found
    )


def test_start_up_of_a_large_pool(capsys):
    "A list of 100,000 paths is taken in, and no image held: each would take 3 kB at the least, not some bytes"
    speed.main(['--pool', '100000'])
    first, each, taken = speed.json.loads(capsys.readouterr().out)
    assert first > 0 and each > 0 and taken < 30e6


def test_what_is_measured_on_a_gpu_alone(small):
    "The same code on the CPU, with a small network and few steps"
    assert 0 < speed.views_of_448('cpu', 1) < 10
    text = speed.waiting('cpu', 2, 6)
    rows = [o.split(' | ') for o in text.splitlines()[2:11]]
    assert [o[2] for o in rows] == speed.FORWARDS * 3 and all(o[5].endswith('% |') for o in rows)
    assert 'WRN-28-2 in float32, 2 labelled images' in text


def test_rounds_and_ratios():
    calls = []
    times = speed.in_turn({'a': lambda: calls.append('a') or 2, 'b': lambda: calls.append('b') or 1}, 3)
    assert times == {'a': [2] * 3, 'b': [1] * 3} and calls == ['a', 'b'] * 4
    assert speed.ratio({'a': [2, 4, 9], 'b': [1, 4, 3]}, 'b') == {'a': 2, 'b': 1}


def test_wide_resnet_is_the_papers():
    n = sum(p.numel() for p in speed.wide_resnet().parameters())
    assert 1.45e6 < n < 1.5e6, '1.5 million, as the paper says'


@pytest.fixture
def photos(tmp_path):
    "A folder in the form of CIFAR-10: two classes, 12 images of each to train on and 4 to test on"
    rng = np.random.default_rng(0)
    for part, n in (('train', 12), ('test', 4)):
        for c in ('cat', 'dog'):
            (tmp_path / 'photos' / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / 'photos' / part / c / f'{i}.png'
                )
    return tmp_path / 'photos'


def test_the_cifar10_benchmark(photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip('omegaconf', reason='omegaconf is not installed')
    real, measured = cifar10.measure, []

    def measure(*args):
        measured.append(real(*args))
        return 3, 1

    monkeypatch.setattr(cifar10, 'measure', measure)
    sizes = '--labels 4 --network wrn_10_1 --bs 2 --mu 2 --evals 2 --measure 2 --workers 0 --device cpu'
    args = [*sizes.split(), '--images', str(photos)]
    cifar10.main([*args, '--minutes', '1', '--out', str(tmp_path)])
    assert measured[0][0] > 0 and measured[0][1] >= 0
    rows = pd.read_csv(tmp_path / 'cifar10.csv')
    assert list(rows) == cifar10.COLUMNS and len(rows) == 2
    assert rows.step.tolist() == [rows.steps[0] // 2, rows.steps[0]] and 2 <= rows.steps[0] <= 16
    assert (rows.labels == 4).all() and (rows.n_test == 8).all() and rows.precision[0] == 'fp32'
    assert all(0 <= v <= 1 for k in ('accuracy', 'raw_accuracy') for v in rows[k])
    said = capsys.readouterr().out
    assert f'step {rows.steps[0]:>7,}' in said and f'{100 * rows.accuracy[1]:.2f} % with averaged weights' in said
    with pytest.raises(SystemExit):
        cifar10.main([*args, '--minutes', '0.01', '--out', str(tmp_path)])
    assert 'give more --minutes' in capsys.readouterr().err


def test_plan_of_cifar10():
    "100 s, 5 evaluations of 3 s each: a tenth to spare leaves 75 s for steps of 0.1 s"
    assert cifar10.plan(100, 0.1, 3, 5) == (750, 150)
