"The benchmark commands run, go on after an interrupt, and write the tables that the docs quote"

import csv
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))
import policies  # noqa: E402


def test_policies(tmp_path, monkeypatch, capsys):
    args = [
        '--labels',
        '10',
        '--seeds',
        '2',
        '--steps',
        '3',
        '--mu',
        '2',
        '--workers',
        '0',
        '--out',
        str(tmp_path),
        '--only',
        'supervised',
        'mutual information',
    ]
    policies.main(args)
    rows = list(csv.DictReader((tmp_path / 'policies.csv').open()))
    assert [(r['method'], r['seed']) for r in rows] == [('supervised', '0'), ('mutual information', '0'), ('supervised', '1'), ('mutual information', '1')]
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
    comparison = policies.Comparison(digits, 10, steps=2, mu=1, num_workers=0, n_points=1, n_test=400, flip=False)
    for method, policy in policies.policies(2).items():
        row = policies.run(comparison, 'digits', method, policy, 0)
        assert list(row) and set(row) == set(policies.COLUMNS), method


def test_the_committed_table_is_made_of_the_committed_runs():
    rows = policies.in_order(pd.read_csv(ROOT / 'benchmarks/policies.csv'))
    assert policies.table(rows) == (ROOT / 'benchmarks/policies.md').read_text()
