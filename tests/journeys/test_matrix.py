"What must keep working beside FixMatch, row by row: see matrix.py"

import json
import os
from functools import partial
from pathlib import Path

import gpu_matrix
import pytest
from fastai.vision.all import noop
from matrix import ELSEWHERE, ROWS, TAUGHT, TAUGHT_NAMES, Bench, Row, run

import matrix_page
from fixmatch_fastai.all import FixMatch, ModelEMA
from fixmatch_fastai.record import SemiRecorder

ROOT = Path(matrix_page.ROOT)
WARNINGS = 'CUDA is not available', 'torch.cuda.amp.GradScaler is enabled', 'load_learner'
pytestmark = [pytest.mark.filterwarnings(f'ignore:{o}') for o in WARNINGS]
DEVICE, PRECISION = os.environ.get('MATRIX_DEVICE', 'cpu'), os.environ.get('MATRIX_PRECISION', 'fp32')
SLOW = 'vision_learner with a torchvision body', ', 2 workers'


def params(rows):
    slow = lambda o: [pytest.mark.slow] * o.name.endswith(SLOW)
    return [pytest.param(o, id=o.name, marks=slow(o)) for o in rows]


@pytest.mark.parametrize('row', params(ROWS))
def test_row(row, tmp_path):
    run(row, Bench(tmp_path, DEVICE, PRECISION))


@pytest.mark.slow  # not one, but all together
@pytest.mark.parametrize('row', params(TAUGHT))
def test_row_with_a_teacher(row, tmp_path):
    run(row, Bench(tmp_path, DEVICE, PRECISION, teacher=partial(ModelEMA, half_life=2)))


def test_names_of_rows():
    names = [o.name for o in ROWS]
    assert len(names) == len(set(names)), 'two rows have one name'
    assert set(TAUGHT_NAMES) <= set(names), 'a row with a teacher is none'


def leave_columns_out(monkeypatch):
    start = SemiRecorder.start
    monkeypatch.setattr(SemiRecorder, 'start', lambda self, columns: start(self, columns[:2]))


def leave_stream_open(monkeypatch):
    monkeypatch.setattr(FixMatch, 'after_fit', noop)
    monkeypatch.setattr(FixMatch, 'around_epoch', lambda self, run: run())


@pytest.mark.parametrize(
    'harm,message,options',
    [
        (noop, 'FixMatch changed nothing', dict(lambda_u=0.0)),
        (noop, '6 steps, not 7', dict(steps=7)),
        (leave_columns_out, 'loss_u', {}),
        (leave_stream_open, 'a loader still runs', {}),
    ],
    ids=['no effect', 'steps', 'columns', 'stream'],
)
def test_the_bench_notices(tmp_path, monkeypatch, harm, message, options):
    harm(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        Bench(tmp_path).trains(**options)


def test_the_page_lists_these_rows():
    results = json.loads((ROOT / 'benchmarks/matrix.json').read_text())
    assert list(results['rows']) == [o.name for o in ROWS] + list(ELSEWHERE), 'run `make matrix`'
    assert all((ROOT / file).exists() for file, _ in ELSEWHERE.values()), 'a file of tests is elsewhere'
    assert (ROOT / 'benchmarks/matrix.md').read_text() == matrix_page.page(results)
    assert not [name for name, o in results['rows'].items() if any(v.startswith('fails') for v in o.values())]


def fail(bench):
    raise ValueError('no\nway')


def skip(bench):
    pytest.skip('no such package')


@pytest.mark.slow
def test_gpu_matrix(tmp_path, monkeypatch, capsys):
    rows = [o for o in ROWS if o.name in ('fit_one_cycle', 'to_fp32')]
    rows += [Row('', 'a failure', '', fail), Row('', 'a package', '', skip)]
    monkeypatch.setattr(gpu_matrix, 'ROWS', rows)
    gpu_matrix.main(['--device', 'cpu', '--precision', 'fp16', 'channels_last', '--out', str(tmp_path)])
    text = (tmp_path / 'gpu_matrix.md').read_text()
    assert '| `fit_one_cycle` | works | works |\n| `to_fp32` | works | works |\n' in text
    assert '| a failure | fails | fails |\n| a package | not run | not run |' in text
    assert '- a failure, `to_fp16`, `to_channelslast`: fails, as ValueError: no\n- a package' in text
    assert '4 rows: 4 works, 2 fails, 2 not run' in text
    with pytest.raises(SystemExit, match='No row has MixMatch'):
        gpu_matrix.main(['--device', 'cpu', '--only', 'MixMatch'])
